package http_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

const testPath = "/test/{name}"

// withEndpoint adds a test endpoint to a site. By default it accepts a POST of JSON with any valid key. Each of changes
// may change that.
func withEndpoint(serve func(c *gateway.Call, w http.ResponseWriter, r *http.Request) error, changes ...func(*gateway.Endpoint)) func(*Setup) {
	e := gateway.Endpoint{
		Pattern: "POST " + testPath, Scope: gateway.PerCall, Body: gateway.JSON(1 << 10), Deadline: gateway.AnswerDeadline, Serve: serve,
	}
	for _, change := range changes {
		change(&e)
	}
	return func(o *Setup) { o.Endpoints = append(o.Endpoints, e) }
}

// toTestPath sends a request to the endpoint of withEndpoint.
func toTestPath(r *http.Request) { At(http.MethodPost, "/test/one")(r) }

// New fails if an endpoint lacks a scope, a deadline or another required part.
func TestIncompleteEndpointsAreRejected(t *testing.T) {
	serve := func(*gateway.Call, http.ResponseWriter, *http.Request) error { return nil }
	complete := gateway.Endpoint{Pattern: "GET /x", Scope: keys.ScopeExec, Deadline: time.Second, Serve: serve}
	site := New(t)
	newGateway := func(all ...gateway.Endpoint) error {
		_, err := gateway.New(gateway.Options{Verifier: site.Verifier, Endpoints: all, Log: site.Options.Log})
		return err
	}
	if err := newGateway(complete); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*gateway.Endpoint){
		"no scope":                func(e *gateway.Endpoint) { e.Scope = "" },
		"there is no scope":       func(e *gateway.Endpoint) { e.Scope = "sandbox:everything" },
		"no deadline":             func(e *gateway.Endpoint) { e.Deadline = 0 },
		"no Serve function":       func(e *gateway.Endpoint) { e.Serve = nil },
		"must be a method":        func(e *gateway.Endpoint) { e.Pattern = "/x" },
		"needs one of the scopes": func(e *gateway.Endpoint) { e.Scope, e.WholeServer = gateway.PerCall, true },
		"cannot have a body":      func(e *gateway.Endpoint) { e.Scope, e.Body = gateway.Open, gateway.Stream(1) },
		"needs the method GET":    func(e *gateway.Endpoint) { e.Pattern, e.WebSocket = "POST /x", true },
		"and has no body":         func(e *gateway.Endpoint) { e.Body, e.WebSocket = gateway.Stream(1), true },
		"bad wildcard":            func(e *gateway.Endpoint) { e.Pattern = "GET /{" },
	} {
		e := complete
		if change(&e); newGateway(e) == nil || !strings.Contains(newGateway(e).Error(), want) {
			t.Errorf("New: got error %v, want %q", newGateway(e), want)
		}
	}
	if err := newGateway(complete, complete); err == nil {
		t.Error("New accepted two endpoints with the same pattern")
	}
}

// A request reaches an endpoint only if it passes every check.
func TestRefusedRequestsDoNotReachEndpoints(t *testing.T) {
	reached := 0
	s := New(t, func(o *Setup) { o.RequestsPerSecond = 100 }, withEndpoint(func(c *gateway.Call, w http.ResponseWriter, r *http.Request) error {
		reached++
		w.Header().Set("Cache-Control", "public")
		_, err := fmt.Fprintf(w, "%q %s", r.PathValue("name"), c.Body)
		return err
	}))
	for _, c := range []struct {
		name, body string
		change     func(*http.Request)
		status     int
		code       rpc.Code
	}{
		{"no key", "{}", WithKey(""), 401, rpc.CodeUnauthenticated},
		{"bad key", "{}", WithKey("msb_x"), 401, rpc.CodeUnauthenticated},
		{"GET", "", At(http.MethodGet, "/test/one"), 405, rpc.CodeInvalidRequest},
		{"no name", "", At(http.MethodPost, "/test/"), 404, rpc.CodeInvalidRequest},
		{"two names", "", At(http.MethodPost, "/test/one/two"), 404, rpc.CodeInvalidRequest},
		{"text", "{}", WithHeader("Content-Type", "text/plain"), 415, rpc.CodeInvalidRequest},
		{"too long", `"` + strings.Repeat("x", 1<<10) + `"`, toTestPath, 413, rpc.CodeInvalidRequest},
	} {
		WantError(t, s.Post(c.body, toTestPath, c.change), c.status, c.code)
		if reached != 0 {
			t.Fatalf("%s reached the endpoint", c.name)
		}
	}
	w := s.Post(`{"a":1}`, toTestPath)
	if w.Code != http.StatusOK || w.Body.String() != `"one" {"a":1}` || w.Header().Get("Cache-Control") != "no-store" || w.Header().Get("X-Request-Id") == "" {
		t.Errorf("response is %d %v %s, want 200 with the endpoint's body, no-store and a request id", w.Code, w.Header(), w.Body)
	}
	if !strings.Contains(scrape(t, s), `msbd_http_requests_total{code="200",path="/test/{name}"} 1`) {
		t.Error("the metrics do not count the request")
	}
}

// If an endpoint has a scope, the gateway checks it and logs the requests.
func TestEndpointScopes(t *testing.T) {
	for _, wholeServer := range []bool{false, true} {
		s := New(t, withEndpoint(func(*gateway.Call, http.ResponseWriter, *http.Request) error { return nil },
			func(e *gateway.Endpoint) { e.Scope, e.WholeServer = keys.ScopeRead, wholeServer }))
		for _, c := range []struct {
			req    keys.IssueRequest
			allows bool
		}{
			{keys.IssueRequest{}, true},
			{keys.IssueRequest{Scopes: []keys.Scope{keys.ScopeRead}}, true},
			{keys.IssueRequest{Scopes: []keys.Scope{keys.ScopeExec}}, false},
			{keys.IssueRequest{Namespaces: []string{"team"}}, !wholeServer},
		} {
			w := s.Post("{}", toTestPath, WithKey(s.Issue(t, c.req)))
			if c.allows && w.Code != http.StatusOK {
				t.Errorf("key %+v: response is %d %s, want 200", c.req, w.Code, w.Body)
			} else if !c.allows {
				WantError(t, w, http.StatusForbidden, rpc.CodePermissionDenied)
			}
		}
		if !strings.Contains(s.Log.String(), "msg=call") || !strings.Contains(s.Log.String(), "method=/test/{name}") {
			t.Error("the requests are not in the log:", s.Log)
		}
	}
}

// Unless the endpoint flushes, a client gets its complete response or only an error.
func TestResponses(t *testing.T) {
	type serve = func(*gateway.Call, http.ResponseWriter, *http.Request) error
	for name, c := range map[string]struct {
		serve  serve
		status int
		code   rpc.Code // 0 means that the body is "whole"
	}{
		"complete": {func(_ *gateway.Call, w http.ResponseWriter, _ *http.Request) error {
			io.WriteString(w, "wh")
			_, err := io.WriteString(w, "ole")
			return err
		}, 200, 0},
		"panic": {func(_ *gateway.Call, w http.ResponseWriter, _ *http.Request) error {
			io.WriteString(w, "half")
			panic("a fault")
		}, 500, rpc.CodeInternal},
		"error": {func(_ *gateway.Call, w http.ResponseWriter, _ *http.Request) error {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "half")
			return fmt.Errorf("no such thing: %w", errdefs.ErrNotFound)
		}, 404, rpc.CodeNotFound},
		"refusal": {func(*gateway.Call, http.ResponseWriter, *http.Request) error {
			return &gateway.Refusal{Status: 418, ClientError: &rpc.Error{Code: rpc.CodeConflict, Message: "no"}, Cause: errors.New("a cause")}
		}, 418, rpc.CodeConflict},
		"flushed": {func(_ *gateway.Call, w http.ResponseWriter, _ *http.Request) error {
			io.WriteString(w, "wh")
			if err := http.NewResponseController(w).Flush(); err != nil {
				t.Error(err)
			}
			w.WriteHeader(http.StatusTeapot)
			_, err := io.WriteString(w, "ole")
			return err
		}, 200, 0},
		"error after a flush": {func(_ *gateway.Call, w http.ResponseWriter, _ *http.Request) error {
			io.WriteString(w, "whole")
			http.NewResponseController(w).Flush()
			return errors.New("no more")
		}, 200, 0},
		"panic after a flush": {func(_ *gateway.Call, w http.ResponseWriter, _ *http.Request) error {
			io.WriteString(w, "whole")
			http.NewResponseController(w).Flush()
			panic("a fault")
		}, 200, 0},
	} {
		s := New(t, withEndpoint(c.serve))
		w := httptest.NewRecorder()
		aborted := func() (aborted bool) { // reports whether net/http would abort the response
			defer func() { aborted = recover() == http.ErrAbortHandler }()
			r := httptest.NewRequest(http.MethodPost, "/test/one", strings.NewReader("{}"))
			r.Header.Set("Authorization", s.Key)
			r.Header.Set("Content-Type", "application/json")
			s.ServeHTTP(w, r)
			return false
		}()
		if want := name == "panic after a flush" || name == "error after a flush"; aborted != want {
			t.Errorf("%s: response was aborted: %t, want %t", name, aborted, want)
		}
		if c.code != 0 {
			WantError(t, w, c.status, c.code)
			if w.Header().Get("Content-Type") != "application/json" {
				t.Errorf("%s: error has headers %v, want Content-Type: application/json", name, w.Header())
			}
		} else if w.Code != c.status || w.Body.String() != "whole" || w.Header().Get("X-Request-Id") == "" {
			t.Errorf("%s: response is %d %v %q, want %d with a request id and the body \"whole\"", name, w.Code, w.Header(), w.Body, c.status)
		}
		if log := s.Log.String(); strings.HasPrefix(name, "panic") && (!strings.Contains(log, "request failed") || !strings.Contains(log, "a fault")) {
			t.Errorf("%s: the log lacks the failure or its cause: %s", name, log)
		}
	}
}

// If the key is revoked while the endpoint runs, its response is discarded.
func TestResponseIsDiscardedIfKeyIsRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := make(chan struct{})
		s := New(t, withEndpoint(func(_ *gateway.Call, w http.ResponseWriter, r *http.Request) error {
			close(began)
			<-r.Context().Done()
			_, err := io.WriteString(w, "something")
			return err
		}))
		key, id := s.IssueNamed(t, keys.IssueRequest{})
		answered := make(chan *httptest.ResponseRecorder)
		go func() { answered <- s.Post("{}", toTestPath, WithKey(key)) }()
		<-began
		if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
			t.Fatal(err)
		}
		WantError(t, <-answered, http.StatusUnauthorized, rpc.CodeUnauthenticated)
	})
}

// All bytes of a pending response count against the limits until they are sent, whether they are output of runs or were
// written by the endpoint.
func TestHeldBytes(t *testing.T) {
	var serve func(c *gateway.Call, w http.ResponseWriter, r *http.Request) error
	s := New(t, withEndpoint(func(c *gateway.Call, w http.ResponseWriter, r *http.Request) error { return serve(c, w, r) }))
	s.SetHeld(3000, 2000, 0)
	write := func(n int) error {
		serve = func(_ *gateway.Call, w http.ResponseWriter, _ *http.Request) error {
			for range n {
				w.Write([]byte("x")) // the gateway must notice the error even if the endpoint ignores it
			}
			return nil
		}
		return nil
	}
	write(2000)
	if w := s.Post("", toTestPath); w.Code != http.StatusOK || w.Body.Len() != 2000 {
		t.Errorf("response is %d with %d bytes, want 200 with 2000", w.Code, w.Body.Len())
	}
	write(2001)
	w := s.Post("", toTestPath)
	WantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
	if w.Header().Get("Retry-After") != "" {
		t.Error("the response has Retry-After, although the same request would fail again")
	}
	// Libraries flush even after a write that has failed.
	serve = func(_ *gateway.Call, w http.ResponseWriter, _ *http.Request) error {
		w.Write([]byte("event"))
		w.Write(make([]byte, 2000))
		w.(http.Flusher).Flush()
		w.Write([]byte("event"))
		return nil
	}
	WantError(t, s.Post("", toTestPath), http.StatusTooManyRequests, rpc.CodeExhausted)
	// The output that a run holds is not counted again when it is written to the response. Flushed bytes do not count.
	serve = func(c *gateway.Call, w http.ResponseWriter, _ *http.Request) error {
		if err := c.Hold(1900); err != nil {
			return err
		}
		w.Write(make([]byte, 1900))
		if err := c.Hold(101); err == nil {
			t.Error("Hold exceeded the limit without an error")
		}
		http.NewResponseController(w).Flush()
		_, err := w.Write(make([]byte, 10_000))
		return err
	}
	if w := s.Post("", toTestPath); w.Code != http.StatusOK || w.Body.Len() != 11_900 {
		t.Errorf("response is %d with %d bytes, want 200 with 11900", w.Code, w.Body.Len())
	}
	if bytes, keys := s.Held(); bytes != 0 || keys != 0 {
		t.Errorf("after all requests, %d keys hold %d bytes", keys, bytes)
	}
	// A library that still works on a request that has ended cannot hold bytes for it.
	var call *gateway.Call
	serve = func(c *gateway.Call, _ http.ResponseWriter, _ *http.Request) error { call = c; return nil }
	s.Post("", toTestPath)
	if err := call.Hold(1); err == nil {
		t.Error("Hold succeeded for a request that has ended")
	}
}

// A streaming endpoint gets its body in pieces, and each piece of its response is sent at once. The request ends when its
// key is revoked.
func TestStream(t *testing.T) {
	ended := make(chan error, 1)
	s := New(t, withEndpoint(func(_ *gateway.Call, w http.ResponseWriter, r *http.Request) error {
		w.Header().Set("Content-Type", "text/event-stream")
		flush := http.NewResponseController(w).Flush
		if err := flush(); err != nil {
			return err
		}
		in := bufio.NewReader(r.Body)
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				select {
				case <-r.Context().Done(): // the body may end a moment earlier
				case <-time.After(10 * time.Second):
				}
				ended <- context.Cause(r.Context())
				return err
			}
			if _, err := io.WriteString(w, "data: "+line); err != nil {
				return err
			}
			if err := flush(); err != nil {
				return err
			}
		}
	}, func(e *gateway.Endpoint) { e.Body = gateway.Stream(1 << 20) }))
	addr, stop := s.Listen(t)
	defer stop()
	key, id := s.IssueNamed(t, keys.IssueRequest{})
	body, feed := io.Pipe()
	r, err := http.NewRequest(http.MethodPost, "http://"+addr+"/test/stream", body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", key)
	responses := make(chan *http.Response, 1)
	go func() {
		res, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Error(err)
		}
		responses <- res
	}()
	io.WriteString(feed, "first\n")
	res := <-responses
	if res == nil {
		return
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != "text/event-stream" || res.Header.Get("X-Request-Id") == "" ||
		res.Header.Get("X-Accel-Buffering") != "no" {
		t.Errorf("response is %s %v, want 200 with the endpoint's Content-Type, a request id and X-Accel-Buffering: no", res.Status, res.Header)
	}
	out := bufio.NewReader(res.Body)
	for _, want := range []string{"first", "second", "third"} {
		if want != "first" {
			io.WriteString(feed, want+"\n")
		}
		if line, err := out.ReadString('\n'); err != nil || line != "data: "+want+"\n" {
			t.Fatalf("read %q, error %v; want %q", line, err, "data: "+want+"\n")
		}
	}
	if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	io.WriteString(feed, "fourth\n") // this line may still get through
	feed.Close()
	if cause := <-ended; !errdefs.IsUnauthorized(cause) {
		t.Errorf("the request's context ended with cause %v, want unauthenticated", cause)
	}
	stop() // waits until the log line is written
	if !strings.Contains(s.Log.String(), "status=401") {
		t.Error("the log has no line with status 401 for the revoked key:", s.Log)
	}
}

// An endpoint can hijack its connection, as WebSockets do. The connection counts until it is closed. It is closed when
// the key is revoked, when the endpoint returns, and when the server stops.
func TestHijack(t *testing.T) {
	release := make(chan struct{})
	s := New(t, func(o *Setup) { o.MaxConnections = 3 }, withEndpoint(func(_ *gateway.Call, w http.ResponseWriter, r *http.Request) error {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return err
		}
		rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		rw.Flush()
		if r.PathValue("name") == "short" {
			<-release
			return nil
		}
		_, err = io.Copy(conn, rw)
		return err
	}, func(e *gateway.Endpoint) { e.Pattern, e.Body = "GET "+testPath, gateway.Body{} }))
	addr, stop := s.Listen(t)
	defer stop()
	open := func(key, name string) (net.Conn, *bufio.Reader) {
		t.Helper()
		conn := dialTest(t, addr)
		fmt.Fprintf(conn, "GET /test/%s HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n", name, key)
		in := bufio.NewReader(conn)
		res, err := http.ReadResponse(in, nil)
		if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("response is %v, error %v; want status 101", res, err)
		}
		return conn, in
	}
	wantClosed := func(in *bufio.Reader) {
		t.Helper()
		if rest, err := io.ReadAll(in); err != nil && !errors.Is(err, net.ErrClosed) && !strings.Contains(err.Error(), "reset") || len(rest) > 0 {
			t.Errorf("read %q, error %v; want the end of the connection", rest, err)
		}
	}
	wantOpen := func(want int) { // waits, because the server counts a connection down only after it has closed it
		t.Helper()
		for end := time.Now().Add(time.Minute); s.OpenConnections() != want; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d connections are open, want %d", s.OpenConnections(), want)
			}
		}
	}
	key, id := s.IssueNamed(t, keys.IssueRequest{})
	revoked, in := open(key, "echo")
	io.WriteString(revoked, "hello\n")
	if line, err := in.ReadString('\n'); err != nil || line != "hello\n" {
		t.Errorf("read %q, error %v; want hello", line, err)
	}
	if n := s.OpenConnections(); n != 1 {
		t.Errorf("%d connections are open, want 1", n)
	}
	_, short := open(s.Key, "short")
	client, byClient := open(s.Key, "echo")
	wantOpen(3)
	if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	wantClosed(in)
	wantOpen(2)
	close(release)
	wantClosed(short)
	wantOpen(1)
	client.(*net.TCPConn).CloseWrite()
	wantClosed(byClient)
	wantOpen(0)
	// When the server stops, it waits for a hijacked connection and then closes it.
	s.SetDrain(time.Millisecond)
	_, last := open(s.Key, "echo")
	wantOpen(1)
	stop()
	wantClosed(last)
	s.WaitForConnections()
}

// An HTTP/2 connection cannot be hijacked, and the client's error says so.
func TestHijackHTTP2(t *testing.T) {
	s := New(t, withEndpoint(func(_ *gateway.Call, w http.ResponseWriter, _ *http.Request) error {
		_, _, err := http.NewResponseController(w).Hijack()
		return err
	}))
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln, client := newTLS(t, plain, "h2")
	stop := s.ServeOn(t, ln)
	defer stop()
	r, err := http.NewRequest(http.MethodPost, "https://"+plain.Addr().String()+"/test/one", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", s.Key)
	r.Header.Set("Content-Type", "application/json")
	res, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if text, err := io.ReadAll(res.Body); err != nil || res.StatusCode != http.StatusBadRequest || !strings.Contains(string(text), "HTTP/1.1") {
		t.Errorf("response is %s %s, error %v; want 400 with a message about HTTP/1.1", res.Status, text, err)
	}
}

// The size of a stream body and the time of each read are limited. Reading after its end is harmless.
func TestStreamBodyLimits(t *testing.T) {
	const deadline = 200 * time.Millisecond
	s := New(t, withEndpoint(func(_ *gateway.Call, w http.ResponseWriter, r *http.Request) error {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return err
		}
		if n, err := r.Body.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("Read after the end returned %d, %v; want 0, EOF", n, err)
		}
		select {
		case <-r.Context().Done():
			return context.Cause(r.Context())
		case <-time.After(2 * deadline):
		}
		_, err = fmt.Fprintf(w, "%d bytes", len(body))
		return err
	}, func(e *gateway.Endpoint) { e.Body, e.Deadline = gateway.Stream(1000), deadline }))
	addr, stop := s.Listen(t)
	defer stop()
	send := func(length int, body string) (status int, text string) {
		t.Helper()
		conn := dialTest(t, addr)
		fmt.Fprintf(conn, "POST /test/one HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nContent-Length: %d\r\n\r\n%s", s.Key, length, body)
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		response, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(response)
	}
	if status, text := send(1000, strings.Repeat("x", 1000)); status != http.StatusOK || text != "1000 bytes" {
		t.Errorf("body at the limit: response is %d %s, want 200", status, text)
	}
	if status, text := send(1001, strings.Repeat("x", 1001)); status != http.StatusRequestEntityTooLarge || !strings.Contains(text, "1000 bytes") {
		t.Errorf("body over the limit: response is %d %s, want 413", status, text)
	}
	if status, text := send(1000, "only a part"); status == http.StatusOK {
		t.Errorf("body that stops before its end: response is %d %s, want an error", status, text)
	}
}

// An open endpoint can hijack its connection.
func TestHijackOpenEndpoint(t *testing.T) {
	s := New(t, withEndpoint(func(_ *gateway.Call, w http.ResponseWriter, _ *http.Request) error {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			_, err = io.WriteString(conn, "hello")
		}
		return err
	}, func(e *gateway.Endpoint) { e.Pattern, e.Scope, e.Body = "GET "+testPath, gateway.Open, gateway.Body{} }))
	addr, stop := s.Listen(t)
	defer stop()
	conn := dialTest(t, addr)
	fmt.Fprint(conn, "GET /test/one HTTP/1.1\r\nHost: x\r\n\r\n")
	if text, err := io.ReadAll(conn); err != nil || string(text) != "hello" {
		t.Errorf("read %q, error %v; want hello", text, err)
	}
}

// A client of JSON-RPC may take at most a minute to accept a response.
func TestJSONRPCEndpoints(t *testing.T) {
	for _, e := range New(t).Service.Endpoints() {
		if e.Deadline != time.Minute || e.Scope != gateway.PerCall || e.Body != gateway.JSON(rpc.MaxBody) {
			t.Errorf("endpoint %+v: want a deadline of 1m, the scope PerCall and a JSON body of at most %d bytes", e, rpc.MaxBody)
		}
	}
}
