package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"

	"github.com/msbd/msbd/daemon/internal/guest/agent/channel"
)

// serveTest runs a server as the agent does, without the methods that would change this machine, until
// the test ends.
func serveTest(t testing.TB, l net.Listener) {
	t.Helper()
	a := newAgent(slog.New(slog.DiscardHandler))
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(a.intercept))
	if err != nil {
		t.Fatal(err)
	}
	pb.RegisterHealthService(server, health{})
	server.RegisterService("grpc.AgentService", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"GetOOMEvent": func(ctx context.Context, unmarshal func(any) error) (any, error) {
			var req pb.GetOOMEventRequest
			if err := unmarshal(&req); err != nil {
				return nil, err
			}
			return a.GetOOMEvent(ctx, &req)
		},
	}})
	ended := make(chan error)
	go func() { ended <- server.Serve(context.Background(), channel.RequestsOnly(l)) }()
	t.Cleanup(func() {
		server.Close()
		if err := <-ended; !errors.Is(err, ttrpc.ErrServerClosed) {
			t.Errorf("server: %v", err)
		}
	})
}

// TestConnections holds every odd conversation many times at once, as the host's end of a vsock can.
func TestConnections(t *testing.T) {
	quietClient(t)
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	t.Run("all", func(t *testing.T) {
		socket := filepath.Join(t.TempDir(), "agent.sock")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		serveTest(t, l)
		dial := func() net.Conn {
			conn, err := net.Dial("unix", socket)
			if err != nil {
				t.Error(err)
				conn, _ = net.Pipe()
			}
			return conn
		}
		for what, v := range conversations() {
			atOnce(10, func(int) {
				conn := dial()
				defer conn.Close()
				if err := v.hold(conn, callLimit); err != nil {
					t.Errorf("%s: %v", what, err)
				}
			})
		}
		// Callers that say nothing, and one that is slow, hinder nobody.
		for range 300 {
			conn := dial()
			defer conn.Close()
		}
		conn := dial()
		defer conn.Close()
		go func() { _, _ = io.Copy(conn, iotest.OneByteReader(bytes.NewReader(rawCheck(1)))) }()
		if _, code, err := readAnswer(conn); err != nil || code != codes.OK {
			t.Errorf("slow caller: %v, %v", code, err)
		}
		// A caller that ends its half has ended: what it waits for ends too.
		half := dial().(*net.UnixConn)
		defer half.Close()
		waiting := rawRequest(1, &ttrpc.Request{Service: "grpc.AgentService", Method: "GetOOMEvent"})
		if _, err := half.Write(waiting); err != nil {
			t.Fatal(err)
		}
		if err := half.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		_ = half.SetReadDeadline(time.Now().Add(callLimit))
		if rest, err := io.ReadAll(half); err != nil {
			t.Errorf("after the end of a half: %q, %v", rest, err)
		}
	})
}

// pipes is a listener whose callers are in this process.
type pipes struct {
	callers chan net.Conn
	close   func()
}

func listenPipes() *pipes {
	callers := make(chan net.Conn)
	return &pipes{callers, sync.OnceFunc(func() { close(callers) })}
}

func (p *pipes) Accept() (net.Conn, error) {
	if conn, ok := <-p.callers; ok {
		return conn, nil
	}
	return nil, net.ErrClosed
}

func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

func (p *pipes) Close() error {
	p.close()
	return nil
}

func (p *pipes) dial() net.Conn {
	ours, theirs := net.Pipe()
	p.callers <- theirs
	return ours
}

// FuzzConnection sends anything to the server. It takes all of it or hangs up, and serves the next
// caller.
func FuzzConnection(f *testing.F) {
	for _, v := range conversations() {
		if len(v.send) < 64<<10 {
			f.Add(v.send)
		}
	}
	quietClient(f)
	callers := listenPipes()
	serveTest(f, callers)
	f.Fuzz(func(t *testing.T, data []byte) {
		conn := callers.dial()
		go func() { _, _ = io.Copy(io.Discard, conn) }()
		_ = conn.SetWriteDeadline(time.Now().Add(callLimit))
		if _, err := conn.Write(data); err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("the server does not read: %v", err)
		}
		conn.Close()

		next := callers.dial()
		defer next.Close()
		_ = next.SetDeadline(time.Now().Add(callLimit))
		if _, err := next.Write(rawCheck(1)); err != nil {
			t.Fatal(err)
		}
		if stream, code, err := readAnswer(next); stream != 1 || code != codes.OK || err != nil {
			t.Errorf("the next caller got %v on stream %d, %v", code, stream, err)
		}
	})
}
