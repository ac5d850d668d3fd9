package client

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/rpc"
)

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// reply is the response of a fake server, or the error of a failed connection.
type reply struct {
	status int
	body   string
	header string // "Name: value"
	err    error
}

func (r reply) response() (*http.Response, error) {
	if r.err != nil {
		return nil, r.err
	}
	res := &http.Response{StatusCode: r.status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(r.body))}
	if strings.HasPrefix(r.body, "{") {
		res.Header.Set("Content-Type", "application/json")
	}
	if name, value, ok := strings.Cut(r.header, ": "); ok {
		res.Header.Set(name, value)
	}
	return res, nil
}

// answering returns an HTTP client that gets the replies in turn, and the last one for all further requests.
func answering(replies ...reply) *http.Client {
	var n atomic.Int32
	return &http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) {
		return replies[min(int(n.Add(1)), len(replies))-1].response()
	})}
}

func ok(result string) reply {
	return reply{status: http.StatusOK, body: `{"jsonrpc":"2.0","result":` + result + `,"id":1}`}
}

func refusal(status int, code rpc.Code) reply {
	return reply{status: status, body: fmt.Sprintf(`{"jsonrpc":"2.0","error":{"code":%d,"message":"it is so"},"id":1}`, code)}
}

// calls contains every call of a Client.
var calls = map[string]func(context.Context, *Client) error{
	"health":   func(ctx context.Context, c *Client) error { return c.Health(ctx) },
	"discover": func(ctx context.Context, c *Client) error { _, err := c.Discover(ctx); return err },
	"start":    func(ctx context.Context, c *Client) error { return c.Sandbox("", "a").Start(ctx, nil) },
	"stop":     func(ctx context.Context, c *Client) error { return c.Sandbox("", "a").Stop(ctx) },
	"list":     func(ctx context.Context, c *Client) error { _, err := c.ListSandboxes(ctx, ""); return err },
	"get":      func(ctx context.Context, c *Client) error { _, err := c.Sandbox("", "a").Get(ctx); return err },
	"metrics":  func(ctx context.Context, c *Client) error { _, err := c.Metrics(ctx, ""); return err },
	"code": func(ctx context.Context, c *Client) error {
		_, err := c.Sandbox("", "a").RunCode(ctx, "python", "1", 10*time.Second)
		return err
	},
	"command": func(ctx context.Context, c *Client) error {
		_, err := c.Sandbox("", "a").RunCommand(ctx, "true", nil, 10*time.Second)
		return err
	},
}

func TestRequestsAndResults(t *testing.T) {
	t.Parallel()
	var got, result string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got = fmt.Sprintf("%s %s %q %s %s", r.Method, r.URL.Path, r.Header.Get("Authorization"), r.Header.Get("Content-Type"), body)
		if len(r.Header["Idempotency-Key"]) > 0 {
			t.Error("sent an Idempotency-Key")
		}
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		fmt.Fprintf(w, `{"jsonrpc":"2.0","result":%s,"id":1}`, result)
	}))
	defer server.Close()
	c := &Client{ServerURL: server.URL + "/below/", Key: NewKey(testKey), HTTP: server.Client()}
	sb := c.Sandbox("", "my-env")
	team := c.Sandbox("team-alpha", "my-env")
	cpu, memory := 12.5, int64(256)
	measured := rpc.SandboxMetrics{Namespace: "default", Name: "my-env", State: rpc.StateRunning, Running: true, CPUUsage: &cpu, MemoryUsage: &memory}
	const metrics = `{"sandboxes":[{"namespace":"default","name":"my-env","state":"running","running":true,"cpu_usage":12.5,"memory_usage":256,"disk_usage":null,"of_tomorrow":1}]}`
	failed := rpc.SandboxInfo{
		Namespace: "default", Name: "my-env", ID: "1f0c9a2b5d6e7f803a4b", State: rpc.StateFailed, Reason: "its start failed", Image: "microsandbox/python",
		CPUs: 1, Memory: 512, CreatedAt: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	}
	const info = `{"namespace":"default","name":"my-env","id":"1f0c9a2b5d6e7f803a4b","state":"failed","reason":"its start failed","image":"microsandbox/python",` +
		`"cpus":1,"memory":512,"created_at":"2026-01-02T03:04:05Z","of_tomorrow":1}`
	for _, tt := range []struct {
		result       string
		call         func() (any, error)
		method, sent string
		want         any
	}{
		{`"Sandbox my-env started successfully"`, func() (any, error) { return nil, sb.Start(t.Context(), nil) },
			"sandbox.start", `{"sandbox":"my-env"}`, nil},
		{`"Sandbox my-env started successfully"`, func() (any, error) {
			return nil, team.Start(t.Context(), &rpc.SandboxConfig{Image: "microsandbox/node", Memory: 512, CPUs: new(2), Envs: []string{"A=1"}, Workdir: "/w"})
		}, "sandbox.start", `{"sandbox":"my-env","namespace":"team-alpha","config":{"image":"microsandbox/node","memory":512,"cpus":2,"envs":["A=1"],"workdir":"/w"}}`, nil},
		{`"Sandbox my-env stopped successfully"`, func() (any, error) { return nil, team.Stop(t.Context()) },
			"sandbox.stop", `{"sandbox":"my-env","namespace":"team-alpha"}`, nil},
		{`{"status":"error","language":"python","output":[{"stream":"stderr","text":"ZeroDivisionError"}]}`,
			func() (any, error) { return sb.RunCode(t.Context(), "python", "1/0", 1500*time.Millisecond) },
			"sandbox.repl.run", `{"sandbox":"my-env","language":"python","code":"1/0","timeout":1.5}`,
			&rpc.ReplRunResult{Status: rpc.StatusError, Language: "python", Output: []rpc.Line{{Stream: "stderr", Text: "ZeroDivisionError"}}}},
		{`{"command":"sh","args":["-c","exit 3"],"exit_code":3,"success":false,"output":[]}`,
			func() (any, error) { return sb.RunCommand(t.Context(), "sh", []string{"-c", "exit 3"}, 0) },
			"sandbox.command.run", `{"sandbox":"my-env","command":"sh","args":["-c","exit 3"]}`,
			&rpc.CommandRunResult{Command: "sh", Args: []string{"-c", "exit 3"}, ExitCode: 3, Output: []rpc.Line{}}},
		{info, func() (any, error) { return team.Get(t.Context()) },
			"sandbox.get", `{"sandbox":"my-env","namespace":"team-alpha"}`, &failed},
		{`{"sandboxes":[` + info + `]}`, func() (any, error) { return c.ListSandboxes(t.Context(), rpc.AllNamespaces) },
			"sandbox.list", `{"namespace":"*"}`, []rpc.SandboxInfo{failed}},
		{metrics, func() (any, error) { return sb.Metrics(t.Context()) },
			"sandbox.metrics.get", `{"sandbox":"my-env"}`, &measured},
		{metrics, func() (any, error) { return c.Metrics(t.Context(), rpc.AllNamespaces) },
			"sandbox.metrics.get", `{"namespace":"*"}`, []rpc.SandboxMetrics{measured}},
		{`{"openrpc":"1.3.2"}`, func() (any, error) { return c.Discover(t.Context()) },
			"rpc.discover", "", []byte(`{"openrpc":"1.3.2"}`)},
	} {
		result = tt.result
		res, err := tt.call()
		if err != nil {
			t.Errorf("%s: %v", tt.method, err)
		}
		if diff := cmp.Diff(tt.want, res); diff != "" {
			t.Errorf("%s returned (-want +got):\n%s", tt.method, diff)
		}
		params := ""
		if tt.sent != "" {
			params = `,"params":` + tt.sent
		}
		want := fmt.Sprintf(`POST /below/api/v1/rpc "Bearer %s" application/json {"jsonrpc":"2.0","method":%q%s,"id":1}`, testKey, tt.method, params)
		if got != want {
			t.Errorf("sent %s\nwant %s", got, want)
		}
	}
	if err := c.Health(t.Context()); err == nil || got != `GET /below/api/v1/health ""  ` {
		t.Errorf("asked for health with %q: %v", got, err)
	}
	c.Key = Key{}
	result = `""`
	if err := sb.Start(t.Context(), nil); err != nil || !strings.Contains(got, `rpc "" app`) {
		t.Errorf("without a key sent %s: %v", got, err)
	}
}

func TestHealth(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		reply reply
		well  bool
	}{
		"msbd":        {reply{status: 200, body: `{"message":"Service is healthy"}`}, true},
		"other":       {reply{status: 200, body: "<html>"}, false},
		"proxy alone": {reply{status: 502, body: `{"message":"bad gateway"}`}, false},
		"gone":        {reply{err: io.EOF}, false},
	} {
		if err := (&Client{HTTP: answering(tt.reply)}).Health(t.Context()); (err == nil) != tt.well {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestErrorsHaveClasses(t *testing.T) {
	t.Parallel()
	for code, class := range map[rpc.Code]error{
		rpc.CodeParse: errdefs.ErrInvalidArgument, rpc.CodeInvalidRequest: errdefs.ErrInvalidArgument,
		rpc.CodeInvalidParams: errdefs.ErrInvalidArgument, rpc.CodeMethodNotFound: errdefs.ErrNotImplemented,
		rpc.CodeInternal: errdefs.ErrInternal, rpc.CodeUnauthenticated: errdefs.ErrUnauthenticated,
		rpc.CodePermissionDenied: errdefs.ErrPermissionDenied, rpc.CodeNotFound: errdefs.ErrNotFound,
		rpc.CodeConflict: errdefs.ErrConflict, rpc.CodeExhausted: errdefs.ErrResourceExhausted,
		rpc.CodeRunTimeout: ErrRunTimeout, rpc.CodeCommandNotFound: ErrCommandNotFound,
		rpc.CodeRunFailed: ErrRunFailed, rpc.CodeCommandNotExecutable: ErrCommandNotExecutable,
		rpc.CodeUnavailable: errdefs.ErrUnavailable, -32099: errdefs.ErrUnknown,
	} {
		r := refusal(599, code)
		r.header = "Retry-After: 7"
		err := calls["stop"](t.Context(), &Client{HTTP: answering(r)})
		e, is := errors.AsType[*Error](err)
		if !is || !errors.Is(err, class) || e.Code != code || e.Message != "it is so" || e.Status != 599 || e.RetryAfter != 7*time.Second {
			t.Errorf("code %d became %+v", code, err)
		}
		if (class != errdefs.ErrNotFound) && errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("code %d also matches other classes", code)
		}
	}
}

func TestResponsesNotFromMsbd(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		reply reply
		class error
		text  string
	}{
		"page":         {reply{status: 200, body: "<html>"}, errdefs.ErrUnknown, "HTTP status 200"},
		"no envelope":  {reply{status: 200, body: `{"message":"hello"}`}, errdefs.ErrUnknown, "did not come from msbd"},
		"cut":          {reply{status: 200, body: `{"jsonrpc":"2.0","result":"Sand`}, errdefs.ErrUnknown, "did not come from msbd"},
		"no content":   {reply{status: 204}, errdefs.ErrUnknown, "HTTP status 204"},
		"wrong status": {reply{status: 201, body: ok(`"x"`).body}, errdefs.ErrUnknown, "HTTP status 201"},
		"bad gateway":  {reply{status: 502, body: "<html>"}, errdefs.ErrUnavailable, "HTTP status 502"},
		"proxy's own":  {reply{status: 403, body: `{"message":"blocked"}`}, errdefs.ErrPermissionDenied, "HTTP status 403"},
		"newer code":   {refusal(503, -32099), errdefs.ErrUnavailable, "it is so"},
		"other result": {ok(`{"a":1}`), errdefs.ErrUnknown, "sandbox.stop"},
		"plain to TLS": {reply{status: 400, body: "Client sent an HTTP request to an HTTPS server.\n"}, errdefs.ErrUnknown, "https://"},
	} {
		err := calls["stop"](t.Context(), &Client{HTTP: answering(tt.reply)})
		if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: got %v, want %v with %q", name, err, tt.class, tt.text)
		}
	}
}

// Each call has a time limit, even if its context has none. That of a run depends on the timeout of the run.
func TestTimeLimits(t *testing.T) {
	t.Parallel()
	hangs := &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
		<-r.Context().Done()
		return nil, r.Context().Err()
	})}
	for name, want := range map[string]time.Duration{
		"health": 10 * time.Second, "discover": 30 * time.Second, "metrics": 30 * time.Second, "start": 3 * time.Minute, "stop": 2 * time.Minute,
		"code": 10*time.Second + 2*time.Minute, "command": 10*time.Second + 2*time.Minute,
	} {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			err := calls[name](t.Context(), &Client{HTTP: hangs})
			if got := time.Since(began); got != want || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), want.String()) {
				t.Errorf("%s ended after %s: %v", name, got, err)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Hour)
		defer cancel()
		_, err := (&Client{HTTP: hangs}).Sandbox("", "a").RunCode(ctx, "python", "1", 0)
		if ctx.Err() == nil || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a run without a limit: %v", err)
		}
	})
}

// A list may have several pages. A server that never ends the list does not keep the client forever.
func TestListHasPages(t *testing.T) {
	t.Parallel()
	pages := map[string]string{
		`{}`:                    `{"sandboxes":[{"name":"a"},{"name":"b"}],"next":"default/b"}`,
		`{"after":"default/b"}`: `{"sandboxes":[{"name":"c"}],"next":"default/c"}`,
		`{"after":"default/c"}`: `{"sandboxes":[{"name":"c"}],"next":"default/c"}`,
	}
	c := &Client{HTTP: &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
		var req rpc.Request
		if err := json.UnmarshalRead(r.Body, &req); err != nil {
			return nil, err
		}
		return ok(pages[string(req.Params)]).response()
	})}}
	all, err := c.ListSandboxes(t.Context(), "")
	var names []string
	for _, s := range all {
		names = append(names, s.Name)
	}
	if err != nil || strings.Join(names, " ") != "a b c c" {
		t.Errorf("got %q, error %v", names, err)
	}
}

func TestRetries(t *testing.T) {
	t.Parallel()
	refused := reply{err: &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}}
	lost := reply{err: io.ErrUnexpectedEOF}
	busy := refusal(429, rpc.CodeExhausted)
	busy.header = "Retry-After: 1"
	away := refusal(503, rpc.CodeUnavailable)
	never := refusal(503, rpc.CodeUnavailable)
	never.header = "Retry-After: 3600"
	lostRun := refusal(502, rpc.CodeRunFailed)
	lostRun.header = "Retry-After: 1" // msbd does not send it, but a proxy may add it
	proxy := reply{status: 503, body: "<html>"}
	done := map[string]reply{
		"start": ok(`""`), "stop": ok(`""`), "metrics": ok(`{}`), "list": ok(`{}`), "get": ok(`{}`), "code": ok(`{}`), "command": ok(`{}`), "discover": ok(`{}`),
	}
	const all, idempotent = "start stop metrics list get code command discover", "start metrics list get discover"
	for name, tt := range map[string]struct {
		replies  []reply
		retried  string // the calls that are retried
		requests int    // how many requests a retried call makes
	}{
		"once refused":      {[]reply{refused}, all, 2},
		"always refused":    {[]reply{refused, refused, refused}, all, 3},
		"busy":              {[]reply{busy}, all, 2},
		"printed too much":  {[]reply{refusal(429, rpc.CodeExhausted)}, idempotent, 2},
		"away":              {[]reply{away, away}, idempotent, 3},
		"proxy":             {[]reply{proxy}, idempotent, 2},
		"away for long":     {[]reply{never}, "", 0},
		"connection lost":   {[]reply{lost}, "", 0},
		"run failed":        {[]reply{lostRun}, "", 0},
		"answered and done": {[]reply{refusal(504, rpc.CodeRunTimeout)}, "", 0},
	} {
		for call, success := range done {
			synctest.Test(t, func(t *testing.T) {
				sent := 0
				base := answering(append(tt.replies, success)...).Transport
				c := &Client{HTTP: &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
					sent++
					if body, _ := io.ReadAll(r.Body); len(body) == 0 {
						t.Error("retried without a body")
					}
					return base.RoundTrip(r)
				})}}
				began := time.Now()
				err := calls[call](t.Context(), c)
				want := 1
				if strings.Contains(tt.retried, call) {
					want = tt.requests
				}
				if sent != want || (err == nil) != (want > len(tt.replies)) {
					t.Errorf("%s, %s: sent %d times, want %d: %v", name, call, sent, want, err)
				}
				took := time.Since(began)
				if name == "busy" && want == 2 && (took < time.Second || took > 2*time.Second) || want == 1 && took > 0 {
					t.Errorf("%s, %s: waited %s", name, call, took)
				}
			})
		}
	}
	// The end of the context ends the pause before a retry. The error still says why the call was retried.
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		err := calls["start"](ctx, &Client{HTTP: answering(busy)})
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, errdefs.ErrResourceExhausted) {
			t.Errorf("interrupted while waiting: %v", err)
		}
	})
}

// A server may close an idle connection at the moment when a request is sent. Only idempotent calls are retried.
func TestConnectionClosedUnderARequest(t *testing.T) {
	t.Parallel()
	for call, want := range map[string]bool{"metrics": true, "list": true, "get": true, "start": true, "stop": false, "code": false, "command": false} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var ran atomic.Int32
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				r := bufio.NewReader(conn)
				for n := 0; ; n++ {
					req, err := http.ReadRequest(r)
					if err != nil {
						break
					}
					_, _ = io.Copy(io.Discard, req.Body)
					if ran.Add(1) == 2 {
						break
					}
					body := ok(`{}`).body
					if call == "start" || call == "stop" {
						body = ok(`""`).body
					}
					fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
				}
				conn.Close()
			}
		}()
		transport := &http.Transport{}
		c := &Client{ServerURL: "http://" + l.Addr().String(), HTTP: &http.Client{Transport: transport}}
		if err := calls[call](t.Context(), c); err != nil {
			t.Error(err)
		}
		err = calls[call](t.Context(), c)
		if (err == nil) != want || want && ran.Load() != 3 || !want && ran.Load() != 2 {
			t.Errorf("%s: the server had %d requests: %v", call, ran.Load(), err)
		}
		transport.CloseIdleConnections()
		l.Close()
	}
}

// The server interrupts a run when its request is canceled, so canceling the context must cancel the request.
func TestContextCancelsRequest(t *testing.T) {
	t.Parallel()
	began, ended := make(chan struct{}), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.ReadAll(r.Body)
		close(began)
		<-r.Context().Done()
		close(ended)
	}))
	defer server.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("no longer needed")
	go func() {
		<-began
		cancel(why)
	}()
	_, err := (&Client{ServerURL: server.URL, HTTP: server.Client()}).Sandbox("", "a").RunCode(ctx, "python", "while True: pass", time.Minute)
	if !errors.Is(err, context.Canceled) || !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
	<-ended
}

func TestKeyGoesOnlyWhereItIsSafe(t *testing.T) {
	t.Parallel()
	var sent atomic.Int32
	h := &http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) { sent.Add(1); return ok(`""`).response() })}
	for serverURL, safe := range map[string]bool{
		"": true, "http://127.0.0.1:5555": true, "http://127.8.9.1": true, "http://localhost:5555/": true, "http://LOCALHOST": true,
		"http://[::1]:5555": true, "http://[::ffff:127.0.0.1]": true, "https://sandboxes.example.org": true, "HTTPS://192.0.2.1:1/msb": true,
		"http://sandboxes.example.org": false, "http://192.0.2.1:5555": false, "http://10.0.0.1": false, "http://0.0.0.0:5555": false,
		"http://localhost.example.org": false, "http://127.0.0.1.example.org": false, "http://[::]:5555": false, "http://2130706433": false,
		// These are not valid URLs of a server.
		"127.0.0.1:5555": false, "localhost": false, "ftp://127.0.0.1": false, "http://": false, "https:///x": false, "http://127.0.0.1:x": false,
		"https://user:hunter2@example.org": false, "https://example.org?key=hunter2": false, "https://example.org/#hunter2": false,
		"http://a b": false, "http+unix://127.0.0.1": false,
	} {
		before := sent.Load()
		err := calls["stop"](t.Context(), &Client{ServerURL: serverURL, Key: NewKey(testKey), HTTP: h})
		if safe != (err == nil) || safe != (sent.Load() == before+1) {
			t.Errorf("%q: sent %d requests: %v", serverURL, sent.Load()-before, err)
		}
		if !safe && (!errors.Is(err, errdefs.ErrInvalidArgument) || strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), testKey)) {
			t.Errorf("%q: %v", serverURL, err)
		}
	}
	for serverURL, path := range map[string]string{"http://127.0.0.1:5555/api/v1/rpc": "/api/v1/rpc", "https://example.org/below/mcp/": "/mcp"} {
		err := calls["stop"](t.Context(), &Client{ServerURL: serverURL, Key: NewKey(testKey), HTTP: h})
		if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "must not end with "+path+": leave that out") {
			t.Errorf("%q: got %v, want an error that names %s", serverURL, err, path)
		}
	}
	for serverURL, shown := range map[string]bool{"foo": true, testKey: false, "http://a:hunter2@example.org": false, "x?hunter2": false} {
		_, err := LoadConfig(serverURL)
		if err == nil || strings.Contains(err.Error(), serverURL) != shown || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("LoadConfig(%q): got %v, want an error that contains the URL: %t", serverURL, err, shown)
		}
	}
	for _, bad := range []string{"Bearer " + testKey, "msb_a\r\nHost: x", "msb_é", "\"msb_a b\"", "msb_\x00"} {
		err := calls["stop"](t.Context(), &Client{Key: NewKey(bad), HTTP: h})
		if !errors.Is(err, errdefs.ErrInvalidArgument) || strings.Contains(err.Error(), "msb_") {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if err := calls["stop"](t.Context(), &Client{ServerURL: "http://sandboxes.example.org", HTTP: h}); err != nil {
		t.Errorf("without a key: %v", err)
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	t.Parallel()
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the redirect was followed") }))
	defer other.Close()
	for _, status := range []int{301, 302, 303, 307, 308} {
		server := httptest.NewServer(http.RedirectHandler(other.URL+"/x", status))
		err := calls["start"](t.Context(), &Client{ServerURL: server.URL, Key: NewKey(testKey)})
		if err == nil || !strings.Contains(err.Error(), other.URL) {
			t.Errorf("%d: %v", status, err)
		}
		server.Close()
	}
}

func TestUnreachableServersSayWhatToDo(t *testing.T) {
	t.Parallel()
	healthy := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, ok(`""`).body)
	})
	secure, plain := httptest.NewUnstartedServer(healthy), httptest.NewServer(healthy)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	defer plain.Close()
	trusting := secure.Client()
	otherName := trusting.Transport.(*http.Transport).Clone()
	otherName.TLSClientConfig = &tls.Config{RootCAs: otherName.TLSClientConfig.RootCAs, ServerName: "other.example.org"}
	for name, tt := range map[string]struct {
		url   string
		http  *http.Client
		class error
		hint  string
	}{
		"well":              {secure.URL, trusting, nil, ""},
		"unknown authority": {secure.URL, nil, errdefs.ErrUnavailable, "SSL_CERT_FILE"},
		"other name":        {secure.URL, &http.Client{Transport: otherName}, errdefs.ErrUnavailable, "name that the server's certificate is for"},
		"TLS to plain":      {strings.Replace(plain.URL, "http", "https", 1), nil, errdefs.ErrUnavailable, "plain http"},
		"plain to TLS":      {strings.Replace(secure.URL, "https", "http", 1), nil, errdefs.ErrUnknown, "https://"},
		"nothing there":     {"http://127.0.0.3:1", nil, ErrNotRunning, "msb server start"},
		"unknown host": {"https://msbd.invalid", &http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) {
			return nil, &net.DNSError{Err: "no such host", Name: "msbd.invalid"}
		})}, errdefs.ErrUnavailable, "no such host"},
	} {
		err := calls["stop"](t.Context(), &Client{ServerURL: tt.url, Key: NewKey(testKey), HTTP: tt.http})
		if !errors.Is(err, tt.class) {
			t.Errorf("%s: got %v, want %v", name, err, tt.class)
		}
		if err == nil {
			continue
		}
		if !strings.Contains(err.Error(), tt.hint) || strings.Contains(err.Error(), testKey) {
			t.Errorf("%s: %v", name, err)
		}
		if _, is := errors.AsType[*url.Error](err); is {
			t.Errorf("%s: net/http's own error is in %v", name, err)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for header, want := range map[string]time.Duration{
			"": 0, "1": time.Second, "120": 2 * time.Minute, "-1": 0, "soon": 0, "99999999999999999999": 0,
			time.Now().Add(time.Minute).UTC().Format(http.TimeFormat): time.Minute,
			time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat):  0,
		} {
			if got := retryAfter(header); got != want {
				t.Errorf("%q is %s, want %s", header, got, want)
			}
		}
	})
}
