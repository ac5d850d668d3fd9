package http_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

func TestMain(m *testing.M) {
	if os.Getenv(greedyClient) != "" {
		if err := runGreedyClient(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func TestRoutes(t *testing.T) {
	s := New(t)
	send := func(method, path string) *httptest.ResponseRecorder {
		return s.Post(Request("sandbox.metrics.get", "{}"), func(r *http.Request) { r.Method, r.URL.Path = method, path })
	}
	for _, path := range []string{rpc.Path, rpc.StartPath, rpc.StopPath, rpc.RunCommandPath} {
		WantOK(t, send(http.MethodPost, path))
		WantError(t, s.Post("{}", WithKey(""), func(r *http.Request) { r.URL.Path = path }), http.StatusUnauthorized, rpc.CodeUnauthenticated)
		for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPut, http.MethodDelete, http.MethodOptions} {
			w := send(method, path)
			WantError(t, w, http.StatusMethodNotAllowed, rpc.CodeInvalidRequest)
			if w.Header().Get("Allow") != "POST" {
				t.Errorf("%s %s: Allow is %q, want POST", method, path, w.Header().Get("Allow"))
			}
		}
	}
	for _, path := range []string{"/api/v1/rpc/", "//api/v1/rpc", "/api/v1/../v1/rpc", "/api/v1/RPC", "*"} {
		WantError(t, send(http.MethodPost, path), http.StatusNotFound, rpc.CodeInvalidRequest)
	}
	for _, path := range []string{rpc.HealthPath, "/healthz"} {
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			w := s.Post("", WithKey(""), At(method, path))
			if w.Code != http.StatusOK || w.Body.String() != `{"message":"Service is healthy"}` || w.Header().Get("Content-Type") != "application/json" {
				t.Errorf("%s %s: response is %d %v %s, want 200 and the health message", method, path, w.Code, w.Header(), w.Body)
			}
		}
		w := send(http.MethodPost, path)
		WantError(t, w, http.StatusMethodNotAllowed, rpc.CodeInvalidRequest)
		if w.Header().Get("Allow") != "GET, HEAD" {
			t.Errorf("POST %s: Allow is %q, want GET, HEAD", path, w.Header().Get("Allow"))
		}
	}
}

// Somebody who opens the server in a browser learns what it is and where the API is, but not its version.
func TestRoot(t *testing.T) {
	s := New(t)
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		w := s.Post("", WithKey(""), At(method, "/"))
		text := w.Body.String()
		if w.Code != http.StatusOK || w.Header().Get("Content-Type") != "text/plain; charset=utf-8" {
			t.Errorf("%s /: response is %d %v, want 200 and plain text", method, w.Code, w.Header())
		}
		for _, want := range []string{"msbd", rpc.HealthPath, rpc.Path, rpc.MCPPath, rpc.MethodDiscover, "https://"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s /: the text does not mention %s: %s", method, want, text)
			}
		}
		if strings.Contains(text, Version) {
			t.Errorf("%s / reveals the version: %s", method, text)
		}
	}
	w := s.Post(Request("sandbox.metrics.get", "{}"), At(http.MethodPost, "/"))
	e := WantError(t, w, http.StatusMethodNotAllowed, rpc.CodeInvalidRequest)
	if !strings.Contains(e.Message, rpc.Path) || w.Header().Get("Allow") != "GET, HEAD" {
		t.Errorf("POST /: the message does not name the right path, or Allow is wrong: %s, %v", e.Message, w.Header())
	}
}

func TestResponseHeaders(t *testing.T) {
	s := New(t)
	ids := map[string]bool{}
	for _, body := range []string{Request("sandbox.metrics.get", "{}"), "not JSON", `{"jsonrpc":"2.0","method":"note"}`} {
		w := s.Post(body)
		ids[w.Header().Get("X-Request-Id")] = true
		if got := w.Header().Get("Content-Type"); (got == "application/json") == (w.Code == http.StatusNoContent) {
			t.Errorf("response %d has Content-Type %q", w.Code, got)
		}
	}
	if len(ids) != 3 || ids[""] {
		t.Error("want three different request ids, got", ids)
	}
}

func TestContentType(t *testing.T) {
	s := New(t)
	for contentType, ok := range map[string]bool{
		"application/json": true, "application/json; charset=utf-8": true, "Application/JSON;charset=UTF-8": true,
		"": false, "text/plain": false, "application/x-www-form-urlencoded": false, "application/json; charset=utf-16": false, ";": false,
	} {
		w := s.Post(Request("sandbox.metrics.get", "{}"), WithHeader("Content-Type", contentType))
		if ok {
			WantOK(t, w)
		} else {
			WantError(t, w, http.StatusUnsupportedMediaType, rpc.CodeInvalidRequest)
		}
	}
}

func TestLongBody(t *testing.T) {
	s := New(t)
	fits := Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"`)
	fits = strings.TrimSuffix(fits, `,"id":1}`)
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	fits += strings.Repeat("x", rpc.MaxBody-len(fits)-len(`"},"id":1}`)) + `"},"id":1}`
	WantOK(t, s.Post(fits))
	WantError(t, s.Post(fits+" "), http.StatusRequestEntityTooLarge, rpc.CodeInvalidRequest)
	chunked := func(r *http.Request) { r.ContentLength = -1 }
	WantError(t, s.Post(fits+strings.Repeat(" ", rpc.MaxBody), chunked), http.StatusRequestEntityTooLarge, rpc.CodeInvalidRequest)
}

func TestPanics(t *testing.T) {
	s := New(t, func(o *Setup) { o.Verifier = panickingVerifier{} })
	WantError(t, s.Post(Request("sandbox.metrics.get", "{}")), http.StatusInternalServerError, rpc.CodeInternal)
	s = New(t)
	w := s.Post(Request("sandbox.stop", `{"sandbox":"panic"}`))
	e := WantError(t, w, http.StatusInternalServerError, rpc.CodeInternal)
	id := w.Header().Get("X-Request-Id")
	if !strings.Contains(e.Message, id) || e.Data == nil || e.Data.RequestID != id || strings.Contains(e.Message, "fault") {
		t.Errorf("error is %+v, want only the request id %s in it", e, id)
	}
	if log := s.Log.String(); !strings.Contains(log, id) || !strings.Contains(log, "a fault of the domain") || !strings.Contains(log, "level=ERROR") {
		t.Error("the log lacks the cause:", log)
	}
	WantOK(t, s.Post(Request("sandbox.metrics.get", "{}")))
}

// panickingVerifier is a Verifier that panics.
type panickingVerifier struct{}

func (panickingVerifier) Verify(string, netip.Addr) (keys.Principal, error) {
	panic("a fault of the verifier")
}

// By default, net/http handles OPTIONS * itself. The gateway turns that off.
func TestOptionsAsterisk(t *testing.T) {
	s := New(t)
	addr, stop := s.Listen(t)
	defer stop()
	conn := dialTest(t, addr)
	fmt.Fprint(conn, "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || res.StatusCode != http.StatusNotFound || res.Header.Get("X-Request-Id") == "" {
		t.Errorf("response is %+v, error %v; want 404 with a request id", res, err)
	}
}

func TestServeWaitsForRuns(t *testing.T) {
	s := New(t)
	running, finish := make(chan struct{}), make(chan struct{})
	s.Sandboxes.OnRun = func(context.Context) error {
		close(running)
		<-finish
		return nil
	}
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	addr, stop := s.Listen(t)
	result := make(chan int)
	go func() {
		status, _ := s.Send(t, addr, Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`))
		result <- status
	}()
	<-running
	stopped := make(chan struct{})
	go func() { stop(); close(stopped) }()
	// The listener closes at once, but the run continues.
	for {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			break
		}
		conn.Close()
	}
	select {
	case <-stopped:
		t.Fatal("Serve returned while a run was in progress")
	default:
	}
	close(finish)
	if status := <-result; status != http.StatusOK {
		t.Errorf("the run in progress got status %d, want 200", status)
	}
	<-stopped
}

func TestServeCancelsRunsAfterDrainTimeout(t *testing.T) {
	s := New(t)
	s.SetDrain(time.Millisecond)
	running := make(chan struct{})
	s.Sandboxes.OnRun = func(ctx context.Context) error {
		close(running)
		<-ctx.Done()
		return context.Cause(ctx)
	}
	addr, stop := s.Listen(t)
	type response struct {
		status int
		body   string
	}
	responses := make(chan response)
	go func() {
		status, body := s.Send(t, addr, Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`))
		responses <- response{status, body}
	}()
	<-running
	go stop()
	if r := <-responses; r.status != http.StatusServiceUnavailable || !strings.Contains(r.body, "-32009") {
		t.Errorf("the canceled run got the response %d %s, want 503 with code -32009", r.status, r.body)
	}
}

func TestDisconnectCancelsRun(t *testing.T) {
	s := New(t)
	ended := make(chan struct{})
	running := make(chan struct{})
	s.Sandboxes.OnRun = func(ctx context.Context) error {
		close(running)
		<-ctx.Done()
		close(ended)
		return context.Cause(ctx)
	}
	addr, stop := s.Listen(t)
	defer stop()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	body := Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`)
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", rpc.Path, s.Key, len(body), body)
	<-running
	conn.Close()
	<-ended
}

// A run may take longer than ReadTimeout, which limits only how long a client takes to send its request.
func TestRunOutlivesReadTimeout(t *testing.T) {
	s := New(t)
	s.HTTPServer().ReadTimeout = 500 * time.Millisecond
	s.Sandboxes.OnRun = func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Second):
			return nil
		}
	}
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	addr, stop := s.Listen(t)
	defer stop()
	if status, body := s.Send(t, addr, Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`)); status != http.StatusOK {
		t.Errorf("response is %d %s, want 200", status, body)
	}
}

func TestSlowClientsAreDisconnected(t *testing.T) {
	s := New(t)
	s.HTTPServer().ReadHeaderTimeout, s.HTTPServer().ReadTimeout = 500*time.Millisecond, time.Second
	addr, stop := s.Listen(t)
	defer stop()
	for name, start := range map[string]string{
		"header": "POST /api/v1/rpc HTTP/1.1\r\nHost: x\r\nX-Slow: ",
		"body":   "POST /api/v1/rpc HTTP/1.1\r\nHost: x\r\nAuthorization: " + s.Key + "\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{",
		"no key": "POST /api/v1/rpc HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
	} {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, start)
		response, err := io.ReadAll(conn) // until the server closes the connection
		if err != nil || bytes.Contains(response, []byte("200 OK")) {
			t.Errorf("slow %s: response is %q, error %v; want no 200 and the end of the connection", name, response, err)
		}
	}
	def := New(t).HTTPServer()
	if def.ReadHeaderTimeout != 5*time.Second || def.IdleTimeout != 60*time.Second || def.MaxHeaderBytes != 32<<10 || gateway.MaxHeader != 16<<10 {
		t.Error("the default limits differ from the documentation")
	}
}

// Without a write deadline, a client that sends requests and never reads a response could keep its connection forever.
func TestClientsThatDoNotReadAreDisconnected(t *testing.T) {
	const path = "/short"
	s := New(t, func(o *Setup) {
		o.Endpoints = append(o.Endpoints, gateway.Endpoint{
			Pattern: "GET " + path, Scope: gateway.Open, Deadline: 50 * time.Millisecond,
			Serve: func(_ *gateway.Call, w http.ResponseWriter, _ *http.Request) error {
				_, err := io.WriteString(w, "a response")
				return err
			},
		})
	})
	addr, stop := s.Listen(t)
	defer stop()
	conn := dialTest(t, addr)
	conn.SetWriteDeadline(time.Now().Add(20 * time.Second))
	many := strings.Repeat("GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n", 1000)
	for {
		if _, err := io.WriteString(conn, many); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("the server did not close the connection")
		} else if err != nil {
			break
		}
	}
}

// Headers slightly over the limit get a JSON-RPC error. For headers far over the limit, net/http sends its own error.
func TestLongHeader(t *testing.T) {
	s := New(t)
	addr, stop := s.Listen(t)
	defer stop()
	for size, envelope := range map[int]bool{17 << 10: true, 30 << 10: true, 64 << 10: false} {
		for _, path := range []string{rpc.Path, rpc.HealthPath} {
			r, _ := http.NewRequest(http.MethodPost, "http://"+addr+path, nil)
			r.Header.Set("X-Long", strings.Repeat("x", size))
			res, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(res.Body)
			res.Body.Close()
			if res.StatusCode != http.StatusRequestHeaderFieldsTooLarge || strings.Contains(string(body), "-32600") != envelope {
				t.Errorf("%d bytes of headers: response is %s %s, want 431, JSON-RPC error: %t", size, res.Status, body, envelope)
			}
		}
	}
	WantOK(t, s.Post(Request("sandbox.metrics.get", "{}"), WithHeader("X-Long", strings.Repeat("x", 15<<10))))
}

func TestRequestsInFlight(t *testing.T) {
	s := New(t)
	s.SetMaxInFlight(1)
	other := s.Issue(t, keys.IssueRequest{})
	running, finish := make(chan struct{}), make(chan struct{})
	s.Sandboxes.OnRun = func(context.Context) error {
		close(running)
		<-finish
		return nil
	}
	done := make(chan struct{})
	go func() {
		s.Post(Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`))
		close(done)
	}()
	<-running
	w := s.Post(Request("sandbox.metrics.get", "{}"))
	WantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
	if w.Header().Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	WantOK(t, s.Post(Request("sandbox.metrics.get", "{}"), WithKey(other)))
	close(finish)
	<-done
	WantOK(t, s.Post(Request("sandbox.metrics.get", "{}")))
	if n := s.InFlightKeys(); n != 0 {
		t.Errorf("after all requests, %d keys still count as having requests in progress", n)
	}
}
