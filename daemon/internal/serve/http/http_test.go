package http

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
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"go.uber.org/goleak"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRoutes(t *testing.T) {
	s := newSite(t)
	at := func(method, path string) *httptest.ResponseRecorder {
		return s.post(request("sandbox.metrics.get", "{}"), func(r *http.Request) { r.Method, r.URL.Path = method, path })
	}
	for _, path := range []string{rpc.Path, rpc.StartPath, rpc.StopPath, rpc.RunCommandPath} {
		wantOK(t, at(http.MethodPost, path))
		wantError(t, s.post("{}", withKey(""), func(r *http.Request) { r.URL.Path = path }), http.StatusUnauthorized, rpc.CodeUnauthenticated)
		for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPut, http.MethodDelete, http.MethodOptions} {
			w := at(method, path)
			wantError(t, w, http.StatusMethodNotAllowed, rpc.CodeInvalidRequest)
			if w.Header().Get("Allow") != "POST" {
				t.Errorf("%s %s: Allow is %q", method, path, w.Header().Get("Allow"))
			}
		}
	}
	for _, path := range []string{"/", "/api/v1/rpc/", "//api/v1/rpc", "/api/v1/../v1/rpc", "/api/v1/RPC", "*"} {
		wantError(t, at(http.MethodPost, path), http.StatusNotFound, rpc.CodeInvalidRequest)
	}
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		w := s.post("", withKey(""), func(r *http.Request) { r.Method, r.URL.Path = method, rpc.HealthPath })
		if w.Code != http.StatusOK || w.Body.String() != `{"message":"Service is healthy"}` || w.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%s health: %d %v %s", method, w.Code, w.Header(), w.Body)
		}
	}
	w := at(http.MethodPost, rpc.HealthPath)
	wantError(t, w, http.StatusMethodNotAllowed, rpc.CodeInvalidRequest)
	if w.Header().Get("Allow") != "GET, HEAD" {
		t.Error("health: Allow is", w.Header().Get("Allow"))
	}
}

func TestAnswerHeaders(t *testing.T) {
	s := newSite(t)
	ids := map[string]bool{}
	for _, body := range []string{request("sandbox.metrics.get", "{}"), "not JSON", `{"jsonrpc":"2.0","method":"note"}`} {
		w := s.post(body)
		ids[w.Header().Get("X-Request-Id")] = true
		if got := w.Header().Get("Content-Type"); (got == "application/json") == (w.Code == http.StatusNoContent) {
			t.Errorf("%d with Content-Type %q", w.Code, got)
		}
	}
	if len(ids) != 3 || ids[""] {
		t.Error("request ids:", ids)
	}
}

func TestContentType(t *testing.T) {
	s := newSite(t)
	for kind, ok := range map[string]bool{
		"application/json": true, "application/json; charset=utf-8": true, "Application/JSON;charset=UTF-8": true,
		"": false, "text/plain": false, "application/x-www-form-urlencoded": false, "application/json; charset=utf-16": false, ";": false,
	} {
		w := s.post(request("sandbox.metrics.get", "{}"), withHeader("Content-Type", kind))
		if ok {
			wantOK(t, w)
		} else {
			wantError(t, w, http.StatusUnsupportedMediaType, rpc.CodeInvalidRequest)
		}
	}
}

func TestLongBody(t *testing.T) {
	s := newSite(t)
	fits := request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"`)
	fits = strings.TrimSuffix(fits, `,"id":1}`)
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"a"}`)))
	fits += strings.Repeat("x", rpc.MaxBody-len(fits)-len(`"},"id":1}`)) + `"},"id":1}`
	wantOK(t, s.post(fits))
	wantError(t, s.post(fits+" "), http.StatusRequestEntityTooLarge, rpc.CodeInvalidRequest)
	chunked := func(r *http.Request) { r.ContentLength = -1 }
	wantError(t, s.post(fits+strings.Repeat(" ", rpc.MaxBody), chunked), http.StatusRequestEntityTooLarge, rpc.CodeInvalidRequest)
}

func TestInvalidUTF8(t *testing.T) {
	s := newSite(t)
	wantError(t, s.post(request("sandbox.start", "{\"sandbox\":\"a\xff\"}")), http.StatusBadRequest, rpc.CodeParse)
	wantError(t, s.post("\xef\xbb\xbf"+request("sandbox.metrics.get", "{}")), http.StatusBadRequest, rpc.CodeParse)
	wantError(t, s.post(""), http.StatusBadRequest, rpc.CodeParse)
}

func TestBatchLimit(t *testing.T) {
	s := newSite(t)
	batch := func(n int) string {
		return "[" + strings.Join(slices.Repeat([]string{request("sandbox.metrics.get", "{}")}, n), ",") + "]"
	}
	var res []rpc.Response
	if err := json.Unmarshal(s.post(batch(rpc.MaxBatch)).Body.Bytes(), &res); err != nil || len(res) != rpc.MaxBatch {
		t.Errorf("a full batch: %d answers, %v", len(res), err)
	}
	wantError(t, s.post(batch(rpc.MaxBatch+1)), http.StatusBadRequest, rpc.CodeInvalidRequest)
}

func TestTimeLimits(t *testing.T) {
	s := newSite(t)
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"a"}`)))
	for seconds, want := range map[string]time.Duration{
		"0": 0, "null": 0, "1": time.Second, "0.25": 250 * time.Millisecond, "1e-30": 1,
		"30000000000": 1<<63 - 1, "1e300": 1<<63 - 1, "9223372036.854775807": 1<<63 - 1, "9223372036": 9223372036 * time.Second,
	} {
		for _, call := range []string{
			request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1","timeout":`+seconds+`}`),
			request("sandbox.command.run", `{"sandbox":"a","command":"true","timeout":`+seconds+`}`),
		} {
			s.boxes.timeout = -1
			wantOK(t, s.post(call))
			if s.boxes.timeout != want {
				t.Errorf("timeout %s became %v, want %v", seconds, s.boxes.timeout, want)
			}
		}
	}
}

func TestRequestsReachTheDomain(t *testing.T) {
	s := newSite(t)
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"a","namespace":"n","config":{"image":"i","memory":256,"cpus":2,"envs":["A=b"],"workdir":"/w"}}`)))
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"b","namespace":"n","config":{"cpus":0}}`)))
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"c","namespace":"n","config":{}}`)))
	want := "map[n/a:{i 2 256 [A=b] /w} n/b:{ 1 0 [] } n/c:{ 0 0 [] }]"
	if got := fmt.Sprint(s.boxes.boxes); got != want {
		t.Errorf("started %s, want %s", got, want)
	}
	wantOK(t, s.post(request("sandbox.command.run", `{"sandbox":"a","namespace":"n","command":"sh","args":["-c","echo \"$0\"; x &"]}`)))
	if !slices.Equal(s.boxes.args, []string{"-c", `echo "$0"; x &`}) {
		t.Errorf("args became %q", s.boxes.args)
	}
}

func TestPanics(t *testing.T) {
	s := newSite(t, func(o *Options) { o.Verifier = panicking{} })
	wantError(t, s.post(request("sandbox.metrics.get", "{}")), http.StatusInternalServerError, rpc.CodeInternal)
	s = newSite(t)
	w := s.post(request("sandbox.stop", `{"sandbox":"panic"}`))
	e := wantError(t, w, http.StatusInternalServerError, rpc.CodeInternal)
	id := w.Header().Get("X-Request-Id")
	if !strings.Contains(e.Message, id) || e.Data == nil || e.Data.RequestID != id || strings.Contains(e.Message, "fault") {
		t.Errorf("error is %+v, request id %s", e, id)
	}
	if log := s.log.String(); !strings.Contains(log, id) || !strings.Contains(log, "a fault of the domain") || !strings.Contains(log, "level=ERROR") {
		t.Error("the log lacks the cause:", log)
	}
	wantOK(t, s.post(request("sandbox.metrics.get", "{}")))
}

type panicking struct{}

func (panicking) Verify(string, netip.Addr) (keys.Principal, error) {
	panic("a fault of the verifier")
}

func TestDiscover(t *testing.T) {
	s := newSite(t)
	w := s.post(`{"jsonrpc":"2.0","method":"rpc.discover","id":1}`, withKey(s.issue(t, keys.IssueRequest{Namespaces: []string{"n"}})))
	wantOK(t, w)
	var res struct {
		Result document `json:"result"`
	}
	if err := json.Unmarshal(w.Body.Bytes(), &res); err != nil {
		t.Fatal(err)
	}
	if len(res.Result.Methods) != len(s.methods) {
		t.Fatalf("%d methods are described, %d exist", len(res.Result.Methods), len(s.methods))
	}
	for _, m := range res.Result.Methods {
		if _, ok := s.methods[m.Name]; !ok {
			t.Errorf("%s is described and does not exist", m.Name)
		}
		for i, p := range s.methods[m.Name].params {
			if m.Params[i].Name != p.name || m.Params[i].Required != p.required || m.Params[i].Schema.Type == nil {
				t.Errorf("%s: param %d is described as %+v, is %+v", m.Name, i, m.Params[i], p)
			}
		}
	}
	wantError(t, s.post(`{"jsonrpc":"2.0","method":"rpc.discover","id":1}`, withKey("")), http.StatusUnauthorized, rpc.CodeUnauthenticated)
}

// net/http answers some requests by itself unless it is told not to.
func TestOptionsOfTheServer(t *testing.T) {
	s := newSite(t)
	addr, stop := s.listen(t)
	defer stop()
	conn := dialTest(t, addr)
	fmt.Fprint(conn, "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || res.StatusCode != http.StatusNotFound || res.Header.Get("X-Request-Id") == "" {
		t.Errorf("answer is %+v, %v", res, err)
	}
}

// listen serves the site on a loopback port until the returned function is called, which waits.
func (s *site) listen(t testing.TB) (addr string, stop func()) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln.Addr().String(), s.serve(t, ln)
}

// serve is listen on a listener that there is. Its function may be called again.
func (s *site) serve(t testing.TB, ln net.Listener) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error("serve:", err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
}

func (s *site) send(t testing.TB, addr, body string) (int, string) {
	t.Helper()
	r, err := http.NewRequest(http.MethodPost, "http://"+addr+rpc.Path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+s.key)
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Error("send:", err)
		return 0, ""
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		t.Error("read answer:", err)
	}
	return res.StatusCode, string(answer)
}

func TestRunsInFlightEndBeforeServe(t *testing.T) {
	s := newSite(t)
	running, finish := make(chan struct{}), make(chan struct{})
	s.boxes.onRun = func(context.Context) error {
		close(running)
		<-finish
		return nil
	}
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"a"}`)))
	addr, stop := s.listen(t)
	answered := make(chan int)
	go func() {
		status, _ := s.send(t, addr, request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`))
		answered <- status
	}()
	<-running
	stopped := make(chan struct{})
	go func() { stop(); close(stopped) }()
	// The listener closes at once; the run goes on.
	for {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			break
		}
		conn.Close()
	}
	select {
	case <-stopped:
		t.Fatal("Serve returned with a run in flight")
	default:
	}
	close(finish)
	if status := <-answered; status != http.StatusOK {
		t.Error("the run in flight was answered with", status)
	}
	<-stopped
}

func TestDrainCutsLongRuns(t *testing.T) {
	s := newSite(t)
	s.drain = time.Millisecond
	running := make(chan struct{})
	s.boxes.onRun = func(ctx context.Context) error {
		close(running)
		<-ctx.Done()
		return context.Cause(ctx)
	}
	addr, stop := s.listen(t)
	type answer struct {
		status int
		body   string
	}
	answered := make(chan answer)
	go func() {
		status, body := s.send(t, addr, request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`))
		answered <- answer{status, body}
	}()
	<-running
	go stop()
	if a := <-answered; a.status != http.StatusServiceUnavailable || !strings.Contains(a.body, "-32009") {
		t.Errorf("a run that was cut is answered with %d %s", a.status, a.body)
	}
}

func TestGoneClientEndsItsRun(t *testing.T) {
	s := newSite(t)
	ended := make(chan struct{})
	running := make(chan struct{})
	s.boxes.onRun = func(ctx context.Context) error {
		close(running)
		<-ctx.Done()
		close(ended)
		return context.Cause(ctx)
	}
	addr, stop := s.listen(t)
	defer stop()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	body := request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`)
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", rpc.Path, s.key, len(body), body)
	<-running
	conn.Close()
	<-ended
}

// A run may last longer than a client may take to send its request.
func TestRunOutlivesReadTimeout(t *testing.T) {
	s := newSite(t)
	s.server.ReadTimeout = 500 * time.Millisecond
	s.boxes.onRun = func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(time.Second):
			return nil
		}
	}
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"a"}`)))
	addr, stop := s.listen(t)
	defer stop()
	if status, body := s.send(t, addr, request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`)); status != http.StatusOK {
		t.Errorf("answer is %d %s", status, body)
	}
}

func TestSlowClientsAreCut(t *testing.T) {
	s := newSite(t)
	s.server.ReadHeaderTimeout, s.server.ReadTimeout = 500*time.Millisecond, time.Second
	addr, stop := s.listen(t)
	defer stop()
	for name, start := range map[string]string{
		"header": "POST /api/v1/rpc HTTP/1.1\r\nHost: x\r\nX-Slow: ",
		"body":   "POST /api/v1/rpc HTTP/1.1\r\nHost: x\r\nAuthorization: " + s.key + "\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{",
		"no key": "POST /api/v1/rpc HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
	} {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, start)
		answer, err := io.ReadAll(conn) // to the end of the connection
		if err != nil || bytes.Contains(answer, []byte("200 OK")) {
			t.Errorf("slow %s: %q, %v", name, answer, err)
		}
	}
	def := newSite(t)
	if def.server.ReadHeaderTimeout != 5*time.Second || def.server.IdleTimeout != 60*time.Second || def.server.MaxHeaderBytes != 32<<10 || maxHeader != 16<<10 {
		t.Error("the limits are not the documented ones")
	}
}

// A client that sends one request after another and takes no answer would keep its place for ever.
func TestClientsThatTakeNoAnswerAreCut(t *testing.T) {
	s := newSite(t)
	s.answerTimeout = 50 * time.Millisecond
	addr, stop := s.listen(t)
	defer stop()
	conn := dialTest(t, addr)
	conn.SetWriteDeadline(time.Now().Add(20 * time.Second))
	many := strings.Repeat("GET "+rpc.HealthPath+" HTTP/1.1\r\nHost: x\r\n\r\n", 1000)
	for {
		if _, err := io.WriteString(conn, many); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("it was not cut")
		} else if err != nil {
			break
		}
	}
}

// Headers over the limit get an envelope; what is far over it, net/http cuts off by itself.
func TestLongHeader(t *testing.T) {
	s := newSite(t)
	addr, stop := s.listen(t)
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
				t.Errorf("%d bytes of headers: %s %s", size, res.Status, body)
			}
		}
	}
	wantOK(t, s.post(request("sandbox.metrics.get", "{}"), withHeader("X-Long", strings.Repeat("x", 15<<10))))
}

func TestRequestsInFlight(t *testing.T) {
	s := newSite(t)
	s.inFlight = newInFlight(1)
	other := s.issue(t, keys.IssueRequest{})
	running, finish := make(chan struct{}), make(chan struct{})
	s.boxes.onRun = func(context.Context) error {
		close(running)
		<-finish
		return nil
	}
	done := make(chan struct{})
	go func() {
		s.post(request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`))
		close(done)
	}()
	<-running
	w := s.post(request("sandbox.metrics.get", "{}"))
	wantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
	if w.Header().Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	wantOK(t, s.post(request("sandbox.metrics.get", "{}"), withKey(other)))
	close(finish)
	<-done
	wantOK(t, s.post(request("sandbox.metrics.get", "{}")))
	if len(s.inFlight.byKey) != 0 {
		t.Error("keys are still counted:", s.inFlight.byKey)
	}
}
