package http

import (
	"net"
	"net/http"
	"net/netip"
	"sync"
)

// connections bounds how many connections there are. It passes each on as it came, because net/http
// looks at its type for TLS; so the server's ConnState hook reports when one ends. A hijacked one, of which net/http
// reports no end, counts until it is closed.
type connections struct {
	slots chan struct{} // holds one for each connection, and one for that which may come next
	// maxPerSource is how many one source may have, so that it cannot keep out all the others. This machine has
	// no such bound: a proxy on it speaks for everybody.
	maxPerSource int
	// proxies speak for many, too.
	proxies []netip.Prefix

	mu       sync.Mutex
	open     int
	bySource map[netip.Prefix]int
}

func newConnections(max int, proxies []netip.Prefix) *connections {
	return &connections{slots: make(chan struct{}, max), maxPerSource: (max + 1) / 2, proxies: proxies, bySource: map[netip.Prefix]int{}}
}

// listen bounds ln.
func (c *connections) listen(ln net.Listener) net.Listener {
	return &boundedListener{Listener: ln, connections: c, closed: make(chan struct{})}
}

// add counts one more connection of a source, unless the source has its share.
func (c *connections) add(from netip.Prefix) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.bySource[from] >= c.maxPerSource && !from.Addr().IsLoopback() && !containsAddr(c.proxies, from.Addr()) {
		return false
	}
	c.open++
	c.bySource[from]++
	return true
}

// count is how many connections there are.
func (c *connections) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.open
}

// track is for http.Server's ConnState.
func (c *connections) track(conn net.Conn, state http.ConnState) {
	if state == http.StateClosed {
		c.remove(connSource(conn))
	}
}

// remove ends the count of a connection.
func (c *connections) remove(from netip.Prefix) {
	c.mu.Lock()
	c.open--
	if c.bySource[from]--; c.bySource[from] == 0 {
		delete(c.bySource, from)
	}
	c.mu.Unlock()
	<-c.slots
}

// trackHijacked returns a connection that net/http has given up, which counts until it is closed.
func (c *connections) trackHijacked(conn net.Conn) net.Conn {
	from := connSource(conn)
	return &countedConn{Conn: conn, leave: sync.OnceFunc(func() { c.remove(from) })}
}

// countedConn calls leave when it is closed. It may be closed again.
type countedConn struct {
	net.Conn
	leave func()
}

func (c *countedConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

func connSource(conn net.Conn) netip.Prefix { return sourceNet(remoteIP(conn.RemoteAddr().String())) }

// boundedListener accepts a connection only when there is a slot for it. Until then it waits in the
// kernel's queue: slow clients are cut within seconds, and it gets its turn.
type boundedListener struct {
	net.Listener
	connections *connections
	closed      chan struct{}
}

func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		select {
		case l.connections.slots <- struct{}{}:
		case <-l.closed:
			return nil, net.ErrClosed
		}
		conn, err := l.Listener.Accept()
		if err != nil {
			<-l.connections.slots
			return nil, err
		}
		if l.connections.add(connSource(conn)) {
			return conn, nil
		}
		conn.Close()
		<-l.connections.slots
	}
}

// Close is called once, by http.Server.
func (l *boundedListener) Close() error {
	close(l.closed)
	return l.Listener.Close()
}
