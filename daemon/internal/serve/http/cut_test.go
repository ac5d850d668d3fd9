package http_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// A request that is cut short gets an error that says why. The client may repeat it only if no run had begun.
func TestRequestsCutShort(t *testing.T) {
	run := Request("sandbox.command.run", `{"sandbox":"a","command":"true"}`)
	start := Request("sandbox.start", `{"sandbox":"b"}`)
	for _, c := range []struct {
		name, body string
		halfClose  bool // the client closes its side of the connection; otherwise, the server stops
		status     int
		code       rpc.Code
		message    string
		retry      bool
	}{
		{"run, server stops", run, false, http.StatusBadGateway, rpc.CodeRunFailed, "the request was interrupted: the server is stopping", false},
		{"run, half-closed", run, true, http.StatusBadGateway, rpc.CodeRunFailed, "the request was interrupted, because the client ended it", false},
		{"start, server stops", start, false, http.StatusServiceUnavailable, rpc.CodeUnavailable, "the request was cut short because the server is stopping; try again in a moment", true},
		{"start, half-closed", start, true, http.StatusBadRequest, rpc.CodeInvalidRequest, "the request was canceled, because the client closed its side of the connection; keep it open until the response", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			began := make(chan struct{})
			block := func(ctx context.Context) error {
				close(began)
				<-ctx.Done()
				return ctx.Err()
			}
			rt, guest := sandboxtest.NewRuntime(), sandboxtest.NewGuest()
			m := sandbox.NewManager(sandbox.Options{
				Store: sandboxtest.NewMemoryStore(), Runtime: rt, Connect: guest.Connect,
				Defaults: sandbox.Config{Template: sandbox.Template{Image: "default", CPUs: 1, MemoryMiB: 512}}, Quota: func(string) sandbox.Quota { return sandbox.Quota{} },
				CheckSpace: func(uint64) error { return nil }, MakeRoom: func() bool { return false }, Boots: 8,
				HostMemory: func() (available, total uint64, err error) { return 1 << 40, 1 << 40, nil },
				MaxCPUs:    4, MaxMemoryMiB: 4096, StartTimeout: time.Minute, MaxRunTime: time.Minute, Log: slog.New(slog.DiscardHandler),
			})
			if _, err := m.Recover(t.Context()); err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			s := New(t, func(o *Setup) { o.Sandboxes = m })
			s.SetDrain(time.Millisecond)
			WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
			guest.OnRun = func(ctx context.Context, _ any) error { return block(ctx) }
			rt.OnStart = func(ctx context.Context, _ string) error { return block(ctx) }

			addr, stop := s.Listen(t)
			defer stop()
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
				rpc.Path, s.Key, len(c.body), c.body)
			<-began
			if c.halfClose {
				if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
					t.Fatal(err)
				}
			} else {
				go stop()
			}
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			w := httptest.NewRecorder()
			w.Code = res.StatusCode
			w.Body.ReadFrom(res.Body)
			e := WantError(t, w, c.status, c.code)
			if e.Message != c.message || (e.Data != nil) != c.retry || (res.Header.Get("Retry-After") != "") != c.retry {
				t.Errorf("got %q, data %+v, headers %v; want %q, retry %t", e.Message, e.Data, res.Header, c.message, c.retry)
			}
		})
	}
}

// A stream of events ends with an error that says that the server stops.
func TestEventsCutShort(t *testing.T) {
	began := make(chan struct{})
	s := New(t)
	s.Sandboxes.OnRun = func(ctx context.Context) error {
		close(began)
		<-ctx.Done()
		return fmt.Errorf("the request was interrupted: %w", errors.Join(sandbox.ErrRunFailed, context.Cause(ctx)))
	}
	s.SetDrain(time.Millisecond)
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	addr, stop := s.Listen(t)
	defer stop()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	body := Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":""}`)
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nAccept: text/event-stream\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		rpc.Path, s.Key, len(body), body)
	<-began
	go stop()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(res.Body)
	if err != nil || !strings.HasPrefix(string(text), `event: error`+"\n"+`data: {"code":-32010,"message":"the request was interrupted: `) ||
		!strings.Contains(string(text), "the server is stopping") {
		t.Errorf("got %q, %v", text, err)
	}
}
