package http

import (
	"container/list"
	"context"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// reservedFiles is how many file descriptors connections may not use, because the rest of the server needs them: the
// store, the admin socket, containerd, and a few for each sandbox. If the limit is low, half of it is reserved instead.
const reservedFiles = 1024

// LimitConnections returns how many connections the server may have open if want are configured: so many that
// descriptors are left for everything else. files is the limit of open files of this process.
func LimitConnections(want int) (most int, files uint64) {
	// The soft limit counts. Go and host.RaiseFileLimit have raised it as far as they may.
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return want, 0
	}
	available := limit.Cur - min(reservedFiles, limit.Cur/2)
	return max(1, int(min(uint64(want), available))), limit.Cur
}

// connections limits the number of connections. It does not wrap them, because net/http checks the type of a connection
// for TLS. Instead, the server's ConnState hook reports when one is closed. net/http does not report the end of a
// hijacked connection, so trackHijacked wraps that.
type connections struct {
	slots chan struct{} // has one element for each open connection
	// maxPerSource is how many connections one source may have, so that it cannot lock out all others. It does not
	// apply to this machine and to proxies, because a proxy forwards the requests of many clients.
	maxPerSource int
	proxies      []netip.Prefix // the trusted proxies

	mu       sync.Mutex
	open     map[net.Conn]*connection
	bySource map[netip.Prefix]int
	// strangers holds the connections on which no valid key was sent yet, oldest first. Its elements are *connection.
	strangers list.List
}

// connection is an open connection.
type connection struct {
	net.Conn
	from     netip.Prefix
	known    atomic.Bool   // whether a valid key was sent on it
	stranger *list.Element // guarded by connections.mu; nil once the connection is not in connections.strangers anymore
}

// connectionKey is the key of the *connection in the context of its requests.
type connectionKey struct{}

func newConnections(max int, proxies []netip.Prefix) *connections {
	return &connections{
		slots: make(chan struct{}, max), maxPerSource: (max + 1) / 2, proxies: proxies,
		open: map[net.Conn]*connection{}, bySource: map[netip.Prefix]int{},
	}
}

// listen returns a listener that accepts connections from ln within the limits.
func (c *connections) listen(ln net.Listener) net.Listener {
	return &boundedListener{Listener: ln, connections: c, closed: make(chan struct{})}
}

// mayAdd reports whether the source of an address may have one more connection.
func (c *connections) mayAdd(from netip.Addr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bySource[sourceNet(from)] < c.maxPerSource || from.IsLoopback() || containsAddr(c.proxies, from)
}

// add counts one more connection from an address. Its slot is already taken.
func (c *connections) add(conn net.Conn, addr netip.Addr) {
	from := sourceNet(addr)
	c.mu.Lock()
	defer c.mu.Unlock()
	added := &connection{Conn: conn, from: from}
	added.stranger = c.strangers.PushBack(added)
	c.open[conn] = added
	c.bySource[from]++
}

// count returns the number of open connections.
func (c *connections) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.open)
}

// takeSlot takes a slot for one more connection. If none is free, it closes the connection that has been open the longest
// without a valid key, so that slow clients cannot lock out others. If all connections have a valid key, it waits until
// one ends. It returns false if closed is closed first.
func (c *connections) takeSlot(closed <-chan struct{}) bool {
	select {
	case c.slots <- struct{}{}:
		return true
	default:
	}
	c.closeStranger()
	select {
	case c.slots <- struct{}{}:
		return true
	case <-closed:
		return false
	}
}

// closeStranger closes the oldest connection on which no valid key was sent yet. The ConnState hook then frees its slot.
func (c *connections) closeStranger() {
	c.mu.Lock()
	oldest := c.strangers.Front()
	if oldest == nil {
		c.mu.Unlock()
		return
	}
	stranger := c.strangers.Remove(oldest).(*connection)
	stranger.stranger = nil
	c.mu.Unlock()
	conn := stranger.Conn
	if tls, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = tls.NetConn() // closing the TLS connection would wait until the client reads
	}
	conn.Close()
}

// context is the ConnContext hook of the http.Server.
func (c *connections) context(ctx context.Context, conn net.Conn) context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	return context.WithValue(ctx, connectionKey{}, c.open[conn])
}

// markKnown records that a valid key was sent on the connection of a request with the context ctx.
func (c *connections) markKnown(ctx context.Context) {
	conn, _ := ctx.Value(connectionKey{}).(*connection)
	if conn == nil || conn.known.Swap(true) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgetStranger(conn)
}

// forgetStranger removes a connection from c.strangers. The caller holds c.mu.
func (c *connections) forgetStranger(conn *connection) {
	if conn.stranger != nil {
		c.strangers.Remove(conn.stranger)
		conn.stranger = nil
	}
}

// track is the ConnState hook of the http.Server.
func (c *connections) track(conn net.Conn, state http.ConnState) {
	if state == http.StateClosed {
		c.remove(conn)
	}
}

// remove stops counting a connection and frees its slot.
func (c *connections) remove(conn net.Conn) {
	c.mu.Lock()
	removed := c.open[conn]
	delete(c.open, conn)
	c.forgetStranger(removed)
	if c.bySource[removed.from]--; c.bySource[removed.from] == 0 {
		delete(c.bySource, removed.from)
	}
	c.mu.Unlock()
	<-c.slots
}

// trackHijacked wraps a hijacked connection so that it counts until it is closed.
func (c *connections) trackHijacked(conn net.Conn) net.Conn {
	return &countedConn{Conn: conn, onClose: sync.OnceFunc(func() { c.remove(conn) })}
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

// boundedListener accepts connections within the limits. If a connection with a valid key has each slot, one new
// connection waits here, and the others wait in the kernel's queue. If the source of a connection is at its limit, the
// connection is closed at once.
type boundedListener struct {
	net.Listener
	connections *connections
	closed      chan struct{}
}

func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := remoteIP(conn.RemoteAddr().String())
		if !l.connections.mayAdd(from) {
			conn.Close()
			continue
		}
		if !l.connections.takeSlot(l.closed) {
			conn.Close()
			return nil, net.ErrClosed
		}
		l.connections.add(conn, from)
		return conn, nil
	}
}

// Close is called once, by http.Server.
func (l *boundedListener) Close() error {
	close(l.closed)
	return l.Listener.Close()
}
