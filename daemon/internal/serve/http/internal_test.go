package http

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// remoteConn is a connection with any remote address.
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

// remoteListener accepts the connections in conns.
type remoteListener struct {
	net.Listener
	conns chan net.Conn
}

func (l *remoteListener) Accept() (net.Conn, error) { return <-l.conns, nil }

// A source gets at most half of the connections, unless it is this machine, on which a proxy may run, or a trusted proxy.
func TestConnectionLimitPerSource(t *testing.T) {
	c := newConnections(10, []netip.Prefix{netip.MustParsePrefix("198.51.100.7/32"), netip.MustParsePrefix("2001:db8::7/128")})
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
			// Accept now waits for the next connection. Give it one from another source, so that it returns.
			ln.conns <- &remoteConn{from: "203.0.113.9:1", closed: make(chan struct{})}
			c.track(<-got, http.StateClosed)
			return nil
		}
	}
	var opened []*remoteConn
	for i := range 5 {
		conn := open(fmt.Sprintf("192.0.2.1:%d", i+1))
		if conn == nil {
			t.Fatalf("connection %d of a source was refused", i+1)
		}
		opened = append(opened, conn)
	}
	if open("192.0.2.1:9") != nil || open("[::ffff:192.0.2.1]:9") != nil {
		t.Error("a source got more than half of the connections")
	}
	if len(c.slots) != 5 || c.count() != 5 {
		t.Errorf("%d slots are in use and %d connections open, want 5 of both", len(c.slots), c.count())
	}
	c.track(opened[0], http.StateActive)
	c.track(opened[0], http.StateClosed)
	if open("192.0.2.1:9") == nil {
		t.Error("a source was refused after one of its connections had ended")
	}
	if open("192.0.2.2:1") == nil {
		t.Error("another source was refused")
	}
	for _, from := range []string{"127.0.0.1", "::1", "198.51.100.7", "2001:db8::7"} {
		for range 6 {
			addr := netip.MustParseAddr(from)
			if !c.mayAdd(addr) {
				t.Errorf("the limit applies to %s", from)
			}
			c.add(&remoteConn{}, addr)
		}
	}
	if c.mayAdd(netip.MustParseAddr("2001:db8::8")) {
		t.Error("the limit does not apply to a neighbor of a trusted proxy")
	}
}

func TestSourceNet(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.1:80": "192.0.2.1/32", "[::ffff:192.0.2.1]:80": "192.0.2.1/32",
		"[2001:db8:1:2:3::4]:80": "2001:db8:1:2::/64", "[fe80::1%eth0]:80": "fe80::/64", "@": "invalid Prefix",
	} {
		if got := sourceNet(remoteIP(addr)).String(); got != want {
			t.Errorf("source of %q is %s, want %s", addr, got, want)
		}
	}
}

func TestChunks(t *testing.T) {
	var c chunks
	for range 2 {
		var want bytes.Buffer
		for i, size := range []int{0, 1, chunkSize - 1, chunkSize, chunkSize + 1, 3*chunkSize - 2, 5} {
			text := strings.Repeat(string(rune('a'+i)), size)
			want.WriteString(text)
			if i%2 == 0 {
				c.Write([]byte(text))
			} else {
				c.WriteString(text)
			}
		}
		var got bytes.Buffer
		if err := c.writeTo(got.Write); err != nil || c.size != want.Len() || got.String() != want.String() {
			t.Errorf("got %d bytes, size %d, error %v, want %d", got.Len(), c.size, err, want.Len())
		}
		c.reset()
	}
}

// A connection becomes idle again whatever the order in which net/http reports that an HTTP/2 client canceled a request. A
// request that begins after its connection was closed is refused.
func TestCanceledRequestsLeaveIdleConnections(t *testing.T) {
	c := newConnections(1, nil)
	conn, client := net.Pipe()
	defer client.Close()
	c.takeSlot(nil)
	c.add(conn, netip.MustParseAddr("127.0.0.1"))
	ctx, cancel := context.WithCancel(c.context(t.Context(), conn))
	endEarly, err := c.begin(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	c.track(conn, http.StateIdle) // while the handler still runs
	if c.closeIdle() {
		t.Fatal("a connection with a request in progress was closed")
	}
	cancel()
	c.track(conn, http.StateIdle)
	end, err := c.begin(ctx, "b") // a second handler starts after the report
	if err != nil {
		t.Fatal(err)
	}
	endEarly()
	if c.closeIdle() {
		t.Fatal("a connection with a request in progress was closed")
	}
	end()
	if !c.closeIdle() || c.closeIdle() {
		t.Error("the idle connection was not closed exactly once")
	}
	for range 2 {
		if _, err := c.begin(ctx, "b"); !errdefs.IsUnavailable(err) {
			t.Error("a request on a closed connection: error is", err)
		}
		if c.open[conn] != nil {
			c.track(conn, http.StateClosed)
		}
	}
	if len(c.byKey) != 0 || len(c.slots) != 0 {
		t.Errorf("after the connection, %d keys have some and %d slots are taken", len(c.byKey), len(c.slots))
	}
}
