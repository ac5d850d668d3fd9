package http

import (
	"container/list"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"

	"github.com/containerd/errdefs"
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
// for TLS. Instead, the server's ConnState hook reports when one is idle and when it is closed. net/http does not report
// the end of a hijacked connection, so trackHijacked wraps that.
type connections struct {
	slots chan struct{} // has one element for each open connection
	// freed has an element if a connection became idle since takeSlot looked for one.
	freed chan struct{}
	// maxPerSource is how many connections one source may have, so that it cannot lock out all others. It does not
	// apply to this machine and to proxies, because a proxy forwards the requests of many clients.
	maxPerSource int
	proxies      []netip.Prefix // the trusted proxies

	mu       sync.Mutex
	open     map[net.Conn]*connection
	bySource map[netip.Prefix]int
	// byKey holds the owners that have connections. The key is a key's id; "" owns the connections on which no request was
	// accepted yet.
	byKey map[string]*owner
}

// owner is what takeSlot needs to know about the connections of a key.
type owner struct {
	connections int
	idle        list.List // the connections without a request in progress, the longest idle first; of type *connection
}

// connection is an open connection. Its fields are guarded by connections.mu, except the first two, which never change.
type connection struct {
	net.Conn
	from     netip.Prefix
	key      string        // the id of the key of the last accepted request; "" if there was none
	requests int           // the accepted requests that are in progress
	idle     *list.Element // nil unless the connection is in the list of its owner
	closed   bool          // whether takeSlot has closed the connection
}

// connectionKey is the key of the *connection in the context of its requests.
type connectionKey struct{}

func newConnections(max int, proxies []netip.Prefix) *connections {
	return &connections{
		slots: make(chan struct{}, max), freed: make(chan struct{}, 1), maxPerSource: (max + 1) / 2, proxies: proxies,
		open: map[net.Conn]*connection{}, bySource: map[netip.Prefix]int{}, byKey: map[string]*owner{},
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
	c.give(added, "")
	c.setIdle(added)
	c.open[conn] = added
	c.bySource[from]++
}

// count returns the number of open connections.
func (c *connections) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.open)
}

// takeSlot takes a slot for one more connection. If none is free, it closes an idle connection, so that neither slow
// clients nor one key can lock out others. If a request is in progress on every connection, it waits until one is idle or
// ends. It returns false if closed is closed first. Only one goroutine may call it at a time.
func (c *connections) takeSlot(closed <-chan struct{}) bool {
	for {
		select {
		case c.slots <- struct{}{}:
			return true
		default:
		}
		var freed <-chan struct{}
		if !c.closeIdle() {
			freed = c.freed
		}
		select {
		case c.slots <- struct{}{}:
			return true
		case <-freed:
		case <-closed:
			return false
		}
	}
}

// closeIdle closes the connection that has been idle the longest, of the key that has the most connections. All
// connections on which no request was accepted yet count as those of one key, which is preferred if two have equally many.
// The ConnState hook then frees the slot. closeIdle returns false if no connection is idle.
func (c *connections) closeIdle() bool {
	c.mu.Lock()
	var most *owner
	for key, o := range c.byKey {
		if o.idle.Len() > 0 && (most == nil || o.connections > most.connections || o.connections == most.connections && key == "") {
			most = o
		}
	}
	if most == nil {
		c.mu.Unlock()
		return false
	}
	oldest := most.idle.Front().Value.(*connection)
	c.setBusy(oldest)
	oldest.closed = true
	c.mu.Unlock()
	conn := oldest.Conn
	if tls, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = tls.NetConn() // closing the TLS connection would wait until the client reads
	}
	conn.Close()
	return true
}

// give makes a connection one of a key's. The caller holds c.mu.
func (c *connections) give(conn *connection, key string) {
	if c.byKey[key] == nil {
		c.byKey[key] = &owner{}
	}
	c.byKey[key].connections++
	conn.key = key
}

// take reverts give. The caller holds c.mu.
func (c *connections) take(conn *connection) {
	c.setBusy(conn)
	if o := c.byKey[conn.key]; o.connections > 1 {
		o.connections--
	} else {
		delete(c.byKey, conn.key)
	}
}

// setIdle makes a connection the last that closeIdle closes of its owner. The caller holds c.mu.
func (c *connections) setIdle(conn *connection) {
	if conn.idle == nil && !conn.closed {
		conn.idle = c.byKey[conn.key].idle.PushBack(conn)
	}
}

// setBusy prevents closeIdle from closing a connection. The caller holds c.mu.
func (c *connections) setBusy(conn *connection) {
	if conn.idle != nil {
		c.byKey[conn.key].idle.Remove(conn.idle)
		conn.idle = nil
	}
}

// context is the ConnContext hook of the http.Server.
func (c *connections) context(ctx context.Context, conn net.Conn) context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	return context.WithValue(ctx, connectionKey{}, c.open[conn])
}

// begin records that a request of a key was accepted. ctx is the context of the request. Until end is called and the
// response was sent, its connection is not closed for another one. If it was closed already, the error is
// errdefs.ErrUnavailable and nobody may act on the request, because the client gets no response.
func (c *connections) begin(ctx context.Context, key string) (end func(), err error) {
	conn, _ := ctx.Value(connectionKey{}).(*connection)
	if conn == nil { // a test has called the handler without a connection
		return func() {}, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if conn.closed || c.open[conn.Conn] != conn { // HTTP/2 may start a handler after the connection has ended
		return nil, fmt.Errorf("the server closed the connection in favor of another one: %w", errdefs.ErrUnavailable)
	}
	c.setBusy(conn)
	if conn.key != key {
		c.take(conn)
		c.give(conn, key)
	}
	conn.requests++
	return func() { c.end(ctx, conn) }, nil
}

// end records that the handler of an accepted request has ended.
func (c *connections) end(ctx context.Context, conn *connection) {
	c.mu.Lock()
	defer c.mu.Unlock()
	conn.requests--
	// Usually track makes the connection idle, after the response was sent. But if an HTTP/2 client cancels a request,
	// net/http may have reported that before the request began. In this case, the context has ended.
	if conn.requests == 0 && ctx.Err() != nil && c.open[conn.Conn] == conn {
		c.setIdle(conn)
		c.reportFreed()
	}
}

// reportFreed makes takeSlot look for an idle connection again, if it waits.
func (c *connections) reportFreed() {
	select {
	case c.freed <- struct{}{}:
	default:
	}
}

// track is the ConnState hook of the http.Server. With HTTP/1, a connection is idle once a response was sent; with HTTP/2,
// once the last of several was. StateActive does not count: a client could hold a connection with half of a request.
func (c *connections) track(conn net.Conn, state http.ConnState) {
	switch state {
	case http.StateIdle:
		c.mu.Lock()
		defer c.mu.Unlock()
		if idle := c.open[conn]; idle.requests == 0 {
			c.setIdle(idle)
			c.reportFreed()
		}
	case http.StateClosed:
		c.remove(conn)
	}
}

// remove stops counting a connection and frees its slot.
func (c *connections) remove(conn net.Conn) {
	c.mu.Lock()
	removed := c.open[conn]
	delete(c.open, conn)
	c.take(removed)
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

// boundedListener accepts connections within the limits. If a request is in progress on every connection, one new
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
