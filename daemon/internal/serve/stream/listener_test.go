package stream_test

import (
	"context"
	"net"
	"net/http"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/test/bufconn"

	"github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// memory is a listener whose connections are in memory, so that a test can run in a bubble of package synctest.
type memory struct{ *bufconn.Listener }

func (m memory) Accept() (net.Conn, error) {
	conn, err := m.Listener.Accept()
	return memoryConn{conn}, err
}

func (memory) Addr() net.Addr { return loopback }

func (m memory) dial(ctx context.Context, _, _ string) (net.Conn, error) { return m.DialContext(ctx) }

type memoryConn struct{ net.Conn }

func (memoryConn) RemoteAddr() net.Addr { return loopback }

var loopback = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}

// connectMemory is like connect, but for a test in a bubble. The caller must call stop, and may do so more than once.
func connectMemory(t *testing.T, s *servetest.Site) (c *client, stop func()) {
	t.Helper()
	m := memory{bufconn.Listen(64 << 10)}
	stopServer := s.ServeOn(t, m)
	transport := &http.Transport{DialContext: m.dial}
	var stopping atomic.Bool
	stopped := make(chan struct{})
	return &client{t, s, "127.0.0.1", s.Key, &http.Client{Transport: transport}, m.dial}, func() {
		if !stopping.Swap(true) {
			stopServer()
			transport.CloseIdleConnections()
			close(stopped)
		}
		<-stopped
	}
}
