// Package gate accepts msbd's connections to the portal over the network (see package sys/portalport), and passes them to the
// portal. So the portal listens on nothing that a program in the sandbox can reach.
package gate

import (
	"context"
	"crypto/subtle"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/portalport"
)

const (
	// maxPending is how many connections may wait at a time: for their hello, or for the portal.
	maxPending = 32
	// portalTimeout is how long a connection waits for the container to be created.
	portalTimeout = 30 * time.Second
	// acceptPause is the time between two attempts to accept a connection, if the first fails.
	acceptPause = 100 * time.Millisecond
	// passTimeout is how long the portal may take to make room for a connection.
	passTimeout = 10 * time.Second
)

// Gate passes connections to the portal.
type Gate struct {
	log *slog.Logger

	mu      sync.Mutex
	token   string        // empty until there is one
	portal  *portal       // nil until the container is created
	changed chan struct{} // closed when token or portal changes, and then replaced
}

// portal is a portal and the socket over which it gets its connections.
type portal struct {
	socket *net.UnixConn
	ready  chan struct{} // closed when it takes connections
	ended  chan struct{} // closed when it has ended
}

// New returns a gate that accepts no connections until SetToken is called.
func New(log *slog.Logger) *Gate {
	return &Gate{log: log, changed: make(chan struct{})}
}

// Listen returns a listener for Serve.
func Listen() (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	address := netip.AddrPortFrom(portalport.GuestAddress.Addr(), portalport.Port)
	return lc.Listen(context.Background(), "tcp4", address.String())
}

// Serve accepts connections from the host until l is closed. It closes those of programs in the sandbox, which cannot have the
// host's address, at once.
func (g *Gate) Serve(l net.Listener) { g.serve(l, portalport.HostAddress) }

// serve is Serve for another address of the host.
func (g *Gate) serve(l net.Listener, host netip.Addr) {
	pending := make(chan struct{}, maxPending)
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // for example, the guest is out of memory
			g.log.Warn("could not accept a connection to the portal", "err", err)
			time.Sleep(acceptPause)
			continue
		}
		if conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap() != host {
			conn.Close()
			continue
		}
		select {
		case pending <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		go func() {
			defer func() { <-pending }()
			defer conn.Close()
			if err := g.admit(conn.(*net.TCPConn)); err != nil {
				g.log.Warn("refused a connection to the portal", "err", err)
			}
		}()
	}
}

// The errors of admit. They do not have the token.
var (
	errToken   = errors.New("its token is not the guest's")
	errEnded   = errors.New("the portal has ended")
	errTimeout = errors.New("there is no container")
)

// admit passes conn to the portal if its hello has the token.
func (g *Gate) admit(conn *net.TCPConn) error {
	hello, err := portalport.ReadHello(conn)
	if err != nil {
		return err
	}
	p, err := g.awaitPortal(hello.Token)
	if err != nil {
		return err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	if err := p.socket.SetWriteDeadline(time.Now().Add(passTimeout)); err != nil {
		return err
	}
	var passErr error
	err = raw.Control(func(fd uintptr) {
		_, _, passErr = p.socket.WriteMsgUnix([]byte("\x00"+hello.Transfer), unix.UnixRights(int(fd)), nil)
	})
	return errors.Join(err, passErr)
}

// awaitPortal waits for the portal as long as the token is valid.
func (g *Gate) awaitPortal(token string) (*portal, error) {
	timeout := time.NewTimer(portalTimeout)
	defer timeout.Stop()
	for {
		g.mu.Lock()
		valid := g.token != "" && subtle.ConstantTimeCompare([]byte(g.token), []byte(token)) == 1
		p, changed := g.portal, g.changed
		g.mu.Unlock()
		if !valid {
			return nil, errToken
		}
		if p != nil {
			select {
			case <-p.ended:
				return nil, errEnded
			default:
				return p, nil
			}
		}
		select {
		case <-changed:
		case <-timeout.C:
			return nil, errTimeout
		}
	}
}

// change changes fields of g.
func (g *Gate) change(fields func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	fields()
	close(g.changed)
	g.changed = make(chan struct{})
}

// SetToken makes the gate accept new connections with this token only. Connections that the portal has stay open.
func (g *Gate) SetToken(token string) { g.change(func() { g.token = token }) }

// SetPortal makes the gate pass connections to the portal that has the other end of socket. It takes over socket.
func (g *Gate) SetPortal(socket *net.UnixConn) {
	p := &portal{socket, make(chan struct{}), make(chan struct{})}
	g.change(func() { g.portal = p })
	go func() {
		defer socket.Close()
		defer close(p.ended)
		var b [1]byte
		// The portal sends one byte when it takes connections, and nothing after that.
		if n, err := socket.Read(b[:]); n == 1 && err == nil {
			close(p.ready)
			_, _ = socket.Read(b[:])
		}
	}()
}

// AwaitReady waits for up to timeout until the portal takes connections. It reports whether it does.
func (g *Gate) AwaitReady(timeout time.Duration) bool {
	expired := time.NewTimer(timeout)
	defer expired.Stop()
	for {
		g.mu.Lock()
		p, changed := g.portal, g.changed
		g.mu.Unlock()
		var ready, ended chan struct{}
		if p != nil {
			ready, ended = p.ready, p.ended
		}
		select {
		case <-ended:
			return false
		default:
		}
		select {
		case <-ready:
			return true
		case <-ended:
		case <-changed:
		case <-expired.C:
			return false
		}
	}
}
