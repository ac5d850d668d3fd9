package http

import (
	"net"
	"net/http"
	"net/netip"
	"sync"
)

// connections limits the number of connections. It does not wrap them, because net/http checks the type of a connection
// for TLS. Instead, the server's ConnState hook reports when one is closed. net/http does not report the end of a
// hijacked connection, so trackHijacked wraps that.
type connections struct {
	slots chan struct{} // has one element for each open connection, and one for the connection that Accept waits for
	// maxPerSource is how many connections one source may have, so that it cannot lock out all others. It does not
	// apply to this machine and to proxies, because a proxy forwards the requests of many clients.
	maxPerSource int
	proxies      []netip.Prefix // the trusted proxies

	mu       sync.Mutex
	open     int
	bySource map[netip.Prefix]int
}

func newConnections(max int, proxies []netip.Prefix) *connections {
	return &connections{slots: make(chan struct{}, max), maxPerSource: (max + 1) / 2, proxies: proxies, bySource: map[netip.Prefix]int{}}
}

// listen returns a listener that accepts connections from ln within the limits.
func (c *connections) listen(ln net.Listener) net.Listener {
	return &boundedListener{Listener: ln, connections: c, closed: make(chan struct{})}
}

// add counts one more connection of a source. It reports false, and counts nothing, if the source is at its limit.
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

// count returns the number of open connections.
func (c *connections) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.open
}

// track is the ConnState hook of the http.Server.
func (c *connections) track(conn net.Conn, state http.ConnState) {
	if state == http.StateClosed {
		c.remove(connSource(conn))
	}
}

// remove stops counting a connection and frees its slot.
func (c *connections) remove(from netip.Prefix) {
	c.mu.Lock()
	c.open--
	if c.bySource[from]--; c.bySource[from] == 0 {
		delete(c.bySource, from)
	}
	c.mu.Unlock()
	<-c.slots
}

// trackHijacked wraps a hijacked connection so that it counts until it is closed.
func (c *connections) trackHijacked(conn net.Conn) net.Conn {
	from := connSource(conn)
	return &countedConn{Conn: conn, onClose: sync.OnceFunc(func() { c.remove(from) })}
}

// countedConn calls onClose each time it is closed.
type countedConn struct {
	net.Conn
	onClose func()
}

func (c *countedConn) Close() error {
	defer c.onClose()
	return c.Conn.Close()
}

func connSource(conn net.Conn) netip.Prefix { return sourceNet(remoteIP(conn.RemoteAddr().String())) }

// boundedListener accepts a connection only when a slot is free. Until then the connection waits in the kernel's queue.
// The timeouts of http.Server free the slots of clients that are idle or send slowly, but a connection that waits for a
// run keeps its slot until the run ends. If the source of a connection is at its limit, the
// connection is closed at once.
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
