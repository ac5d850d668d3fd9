package http

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"testing"
)

// remoteConn and remoteListener are connections from anywhere.
type remoteConn struct {
	net.Conn
	from   string
	closed chan struct{}
}

func (c *remoteConn) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(c.from))
}

func (c *remoteConn) Close() error {
	close(c.closed)
	return nil
}

type remoteListener struct {
	net.Listener
	conns chan net.Conn
}

func (l *remoteListener) Accept() (net.Conn, error) { return <-l.conns, nil }

// No source gets more than half of the connections, but for this machine, where a proxy may be.
func TestShareOfOneSource(t *testing.T) {
	c := newConnections(10, nil)
	ln := &remoteListener{conns: make(chan net.Conn, 1)}
	bounded := c.listen(ln)
	open := func(from string) (accepted *remoteConn) {
		t.Helper()
		conn := &remoteConn{from: from, closed: make(chan struct{})}
		ln.conns <- conn
		got := make(chan net.Conn, 1)
		go func() {
			a, err := bounded.Accept()
			if err == nil {
				got <- a
			}
		}()
		select {
		case a := <-got:
			return a.(*remoteConn)
		case <-conn.closed:
			// Accept waits for the next: let it have one of another source.
			ln.conns <- &remoteConn{from: "203.0.113.9:1", closed: make(chan struct{})}
			c.track(<-got, http.StateClosed)
			return nil
		}
	}
	var open5 []*remoteConn
	for i := range 5 {
		conn := open(fmt.Sprintf("192.0.2.1:%d", i+1))
		if conn == nil {
			t.Fatalf("connection %d of a source was closed", i+1)
		}
		open5 = append(open5, conn)
	}
	if open("192.0.2.1:9") != nil || open("[::ffff:192.0.2.1]:9") != nil {
		t.Error("a source has more than its share")
	}
	if len(c.slots) != 5 || c.count() != 5 {
		t.Errorf("%d slots are taken by %d connections", len(c.slots), c.count())
	}
	c.track(open5[0], http.StateActive)
	c.track(open5[0], http.StateClosed)
	if open("192.0.2.1:9") == nil {
		t.Error("the share of a source does not come back")
	}
	if open("192.0.2.2:1") == nil {
		t.Error("another source is kept out")
	}
	for i := range 6 {
		if c.add(sourceNet(remoteIP(fmt.Sprintf("127.0.0.1:%d", i+1)))) != true {
			t.Error("this machine is held to a share")
		}
	}
}

func TestSource(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.1:80": "192.0.2.1/32", "[::ffff:192.0.2.1]:80": "192.0.2.1/32",
		"[2001:db8:1:2:3::4]:80": "2001:db8:1:2::/64", "[fe80::1%eth0]:80": "fe80::/64", "@": "invalid Prefix",
	} {
		if got := sourceNet(remoteIP(addr)).String(); got != want {
			t.Errorf("source(%q) = %s, want %s", addr, got, want)
		}
	}
}

func TestSourcesOfBadKeysAreForgotten(t *testing.T) {
	b := newBadKeyLimiter(nil)
	for i := range 2 * maxSources {
		b.count(sourceNet(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})))
	}
	if n := b.sources.Len(); n != maxSources {
		t.Errorf("%d sources are remembered", n)
	}
}
