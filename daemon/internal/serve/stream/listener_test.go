package stream_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// memory is a listener whose connections are in memory, so that a test can run in a bubble of package synctest.
type memory struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (m *memory) Accept() (net.Conn, error) {
	select {
	case conn := <-m.conns:
		return memoryConn{conn}, nil
	case <-m.closed:
		return nil, net.ErrClosed
	}
}

func (m *memory) Close() error {
	close(m.closed)
	return nil
}

func (*memory) Addr() net.Addr { return loopback }

// dial opens a connection. Two goroutines copy its bytes, so that it has a buffer in each direction.
func (m *memory) dial(context.Context, string, string) (net.Conn, error) {
	client, near := net.Pipe()
	far, server := net.Pipe()
	for to, from := range map[net.Conn]net.Conn{near: far, far: near} {
		go func() {
			io.Copy(to, from)
			to.Close()
			from.Close()
		}()
	}
	select {
	case m.conns <- server:
		return client, nil
	case <-m.closed:
		client.Close()
		server.Close()
		return nil, net.ErrClosed
	}
}

type memoryConn struct{ net.Conn }

func (memoryConn) RemoteAddr() net.Addr { return loopback }

var loopback = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}

// connectMemory is like connect, but for a test in a bubble.
func connectMemory(t *testing.T, s *servetest.Site) (c *client, stop func()) {
	t.Helper()
	m := &memory{conns: make(chan net.Conn), closed: make(chan struct{})}
	stopServer := s.ServeOn(t, m)
	transport := &http.Transport{DialContext: m.dial}
	var stopping atomic.Bool
	stopped := make(chan struct{})
	stop = func() {
		if !stopping.Swap(true) {
			stopServer()
			transport.CloseIdleConnections()
			close(stopped)
		}
		<-stopped
	}
	t.Cleanup(stop)
	return &client{t, s, "127.0.0.1", s.Key, &http.Client{Transport: transport}, m.dial}, stop
}
