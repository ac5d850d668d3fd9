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

// serveTest serves the agent's methods on l until the test ends, except for those that would change this machine.
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
			t.Errorf("server ended with %v, want ttrpc.ErrServerClosed", err)
		}
	})
}

// TestConnections has every conversation on many concurrent connections, as the host can over vsock.
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
			inParallel(10, func(int) {
				conn := dial()
				defer conn.Close()
				if err := v.run(conn, callTimeout); err != nil {
					t.Errorf("%s: %v", what, err)
				}
			})
		}
		// Clients that send nothing do not block others, and a slow client gets its response.
		for range 300 {
			conn := dial()
			defer conn.Close()
		}
		conn := dial()
		defer conn.Close()
		go func() { _, _ = io.Copy(conn, iotest.OneByteReader(bytes.NewReader(rawCheck(1)))) }()
		if _, code, err := readResponse(conn); err != nil || code != codes.OK {
			t.Errorf("slow client: status code %v, %v", code, err)
		}
		// If a client closes its half of the connection, the server ends the client's pending request.
		half := dial().(*net.UnixConn)
		defer half.Close()
		waiting := rawRequest(1, &ttrpc.Request{Service: "grpc.AgentService", Method: "GetOOMEvent"})
		if _, err := half.Write(waiting); err != nil {
			t.Fatal(err)
		}
		if err := half.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		_ = half.SetReadDeadline(time.Now().Add(callTimeout))
		if rest, err := io.ReadAll(half); err != nil {
			t.Errorf("half-closed connection: read %q, %v; want the end", rest, err)
		}
	})
}

// TestHandover has one client of the port after another connect as soon as the one before has its response. No request may
// be lost. The guest has two processors, so that one may read a request while the other still handles the disconnection of
// the client before. One thread of QEMU runs both in turns, which makes this likely.
func TestHandover(t *testing.T) {
	g := bootGuest(t, "-accel", "tcg,thread=single", "-smp", "2")
	g.hangUp()
	for i := range 300 {
		conn, err := net.Dial("unix", g.socket)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(callTimeout))
		if _, err := conn.Write(rawCheck(1)); err != nil {
			t.Fatal(err)
		}
		stream, code, err := readResponse(conn)
		if stream != 1 || code != codes.OK || err != nil {
			t.Fatalf("client %d got status code %v on stream %d, %v; want OK on stream 1", i, code, stream, err)
		}
		conn.Close()
	}
}

// pipeListener is a listener for clients in the same process.
type pipeListener struct {
	conns chan net.Conn
	close func()
}

func newPipeListener() *pipeListener {
	conns := make(chan net.Conn)
	return &pipeListener{conns, sync.OnceFunc(func() { close(conns) })}
}

func (p *pipeListener) Accept() (net.Conn, error) {
	if conn, ok := <-p.conns; ok {
		return conn, nil
	}
	return nil, net.ErrClosed
}

func (p *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

func (p *pipeListener) Close() error {
	p.close()
	return nil
}

// dial returns the client's end of a new connection.
func (p *pipeListener) dial() net.Conn {
	client, server := net.Pipe()
	p.conns <- server
	return client
}

// FuzzConnection sends arbitrary bytes to the server. The server must read them or close the connection, and must serve
// the next client.
func FuzzConnection(f *testing.F) {
	for _, v := range conversations() {
		if len(v.send) < 64<<10 {
			f.Add(v.send)
		}
	}
	quietClient(f)
	listener := newPipeListener()
	serveTest(f, listener)
	f.Fuzz(func(t *testing.T, data []byte) {
		conn := listener.dial()
		go func() { _, _ = io.Copy(io.Discard, conn) }()
		_ = conn.SetWriteDeadline(time.Now().Add(callTimeout))
		if _, err := conn.Write(data); err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("write to the server: %v", err)
		}
		conn.Close()

		next := listener.dial()
		defer next.Close()
		_ = next.SetDeadline(time.Now().Add(callTimeout))
		if _, err := next.Write(rawCheck(1)); err != nil {
			t.Fatal(err)
		}
		if stream, code, err := readResponse(next); stream != 1 || code != codes.OK || err != nil {
			t.Errorf("the next client got status code %v on stream %d, %v; want OK on stream 1", code, stream, err)
		}
	})
}
