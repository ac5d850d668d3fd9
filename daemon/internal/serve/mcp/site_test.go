package mcp

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"
	"go.uber.org/goleak"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	serverpc "github.com/msbd/msbd/daemon/internal/serve/rpc"
	"github.com/msbd/msbd/daemon/internal/serve/servetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeSandboxes is a sandbox domain without microVMs that records its calls. Every sandbox but "gone" exists. Those named "a" have
// files and processes, and code in those named "old" has no results.
type fakeSandboxes struct {
	*servetest.Sandboxes
	mu    sync.Mutex
	calls []string
	// onRun, if set, is called by every run of code.
	onRun func(context.Context) error
}

func (f *fakeSandboxes) call(what string, n sandbox.Name) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, what+" "+n.String())
	if n.Name == "gone" {
		return fmt.Errorf("sandbox %s does not exist: %w", n, errdefs.ErrNotFound)
	}
	return nil
}

func (f *fakeSandboxes) StartProcess(ctx context.Context, n sandbox.Name, req sandbox.ProcessRequest) (sandbox.Process, error) {
	f.call("start process", n)
	return f.Sandboxes.StartProcess(ctx, n, req)
}

func (f *fakeSandboxes) AttachProcess(ctx context.Context, n sandbox.Name, id sandbox.ProcessID, o sandbox.AttachOptions) (sandbox.Process, error) {
	f.call("attach", n)
	return f.Sandboxes.AttachProcess(ctx, n, id, o)
}

func (f *fakeSandboxes) ListProcesses(ctx context.Context, n sandbox.Name, each func(sandbox.ProcessInfo) error) error {
	f.call("list processes", n)
	return f.Sandboxes.ListProcesses(ctx, n, each)
}

func (f *fakeSandboxes) WriteInput(ctx context.Context, n sandbox.Name, id sandbox.ProcessID, data io.Reader, end bool) error {
	f.call("input", n)
	return f.Sandboxes.WriteInput(ctx, n, id, data, end)
}

func (f *fakeSandboxes) SignalProcess(ctx context.Context, n sandbox.Name, id sandbox.ProcessID, signal int, all bool) error {
	f.call("signal", n)
	return f.Sandboxes.SignalProcess(ctx, n, id, signal, all)
}

func (f *fakeSandboxes) ReadFile(ctx context.Context, n sandbox.Name, p sandbox.Path, offset, length int64) (sandbox.FileInfo, io.ReadCloser, error) {
	f.call("read", n)
	return f.Sandboxes.ReadFile(ctx, n, p, offset, length)
}

func (f *fakeSandboxes) ListFiles(ctx context.Context, n sandbox.Name, p sandbox.Path, depth int, each func(sandbox.FileInfo) error) error {
	f.call("list files", n)
	return f.Sandboxes.ListFiles(ctx, n, p, depth, each)
}

func (f *fakeSandboxes) WriteFile(ctx context.Context, n sandbox.Name, p sandbox.Path, o sandbox.WriteOptions, data io.Reader) (sandbox.FileInfo, bool, error) {
	f.call("write", n)
	return f.Sandboxes.WriteFile(ctx, n, p, o, data)
}

func (f *fakeSandboxes) RemoveFile(ctx context.Context, n sandbox.Name, p sandbox.Path, recursive bool) error {
	f.call("remove", n)
	return f.Sandboxes.RemoveFile(ctx, n, p, recursive)
}

// takeCalls returns the calls since the last takeCalls.
func (f *fakeSandboxes) takeCalls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

func (f *fakeSandboxes) Start(ctx context.Context, n sandbox.Name, r sandbox.Request) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if r.MemoryMiB < 0 {
		panic("a fault of the domain")
	}
	return f.call("start", n)
}

func (f *fakeSandboxes) Stop(ctx context.Context, n sandbox.Name) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return f.call("stop", n)
}

func (f *fakeSandboxes) RunCode(ctx context.Context, n sandbox.Name, r sandbox.Code) (sandbox.Process, error) {
	if n.Name == "old" && r.Results {
		return nil, fmt.Errorf("the sandbox was started by an earlier version of msbd: %w", errdefs.ErrFailedPrecondition)
	}
	return &sandboxtest.Process{Context: ctx, Body: func(ctx context.Context) ([]sandbox.Event, int, error) {
		if err := f.call("code", n); err != nil {
			return nil, 0, err
		}
		if f.onRun != nil {
			if err := f.onRun(ctx); err != nil {
				return nil, 0, err
			}
		}
		if events := print(r.Text); events != nil {
			return events, 0, nil
		}
		if events := show(r); events != nil {
			return events, 0, nil
		}
		out := []sandbox.Event{sandbox.Output{Stream: sandbox.Stdout, Data: []byte("ran " + r.Text + "\n")}}
		if r.Text == "overtime" {
			return out, 0, sandbox.ErrRunTimeout
		}
		if r.Text == "raise" {
			return append(out, sandbox.Output{Stream: sandbox.Stderr, Data: []byte("ValueError\n")}), 1, nil
		}
		return out, 0, nil
	}}, nil
}

// print returns the output of a run of code or of a program "N KiB of TEXT", in pieces of 64 KiB, which share their memory.
// TEXT is a quoted string. The result is nil for another program.
func print(program string) (events []sandbox.Event) {
	count, what, ok := strings.Cut(program, " KiB of ")
	if !ok {
		return nil
	}
	size, err1 := strconv.Atoi(count)
	what, err2 := strconv.Unquote(what)
	if err1 != nil || err2 != nil {
		panic(program)
	}
	piece := sandbox.Output{Stream: sandbox.Stdout, Data: []byte(strings.Repeat(what, 64<<10/len(what)))}
	for range size / 64 {
		events = append(events, piece)
	}
	return append(events, sandbox.Output{Stream: sandbox.Stdout, Data: piece.Data[:(size%64<<10)/len(what)*len(what)]})
}

// show returns the events of code "show DISPLAYS", which shows values: a JSON array. In it, HUGE stands for 2 MiB of base64, and
// LARGE for a little less. "fail TRACEBACK" raises an exception.
func show(code sandbox.Code) (events []sandbox.Event) {
	what, rest, _ := strings.Cut(code.Text, " ")
	if !code.Results || what != "show" && what != "fail" {
		return nil
	}
	piece := func(failed bool, text []byte) sandbox.Event {
		return sandbox.Piece{Error: failed, Data: text, First: true, Last: true}
	}
	if what == "fail" {
		text, _ := json.Marshal(rpc.Exception{Name: "ValueError", Value: "x", Traceback: rest})
		return []sandbox.Event{piece(true, text)}
	}
	huge := strings.Repeat("A", 2<<20)
	rest = strings.NewReplacer("HUGE", huge, "LARGE", huge[4:]).Replace(rest)
	var displays []json.RawMessage
	if err := json.Unmarshal([]byte(rest), &displays); err != nil {
		panic(err)
	}
	events = append(events, sandbox.Output{Stream: sandbox.Stdout, Data: []byte("before\n")})
	for _, d := range displays {
		events = append(events, piece(false, d))
	}
	return events
}

func (f *fakeSandboxes) RunCommand(ctx context.Context, n sandbox.Name, r sandbox.Command) (sandbox.Process, error) {
	return &sandboxtest.Process{Context: ctx, Body: func(context.Context) ([]sandbox.Event, int, error) {
		if err := f.call("command", n); err != nil {
			return nil, 0, err
		}
		if r.Program == "false" {
			return nil, 1, nil
		}
		if events := print(r.Program); events != nil {
			return events, 0, nil
		}
		return []sandbox.Event{sandbox.Output{Stream: sandbox.Stdout, Data: []byte(strings.Join(r.Args, " ") + "\n")}}, 0, nil
	}}, nil
}

// ListIn returns one sandbox.
func (f *fakeSandboxes) ListIn(namespaces []string) ([]sandbox.Record, error) {
	n := sandbox.Name{Namespace: strings.Join(namespaces, ","), Name: "a"}
	return []sandbox.Record{record(n)}, f.call("list", n)
}

func (f *fakeSandboxes) Get(n sandbox.Name) (sandbox.Record, error) {
	return record(n), f.call("get", n)
}

func record(n sandbox.Name) sandbox.Record {
	return sandbox.Record{
		ID: "1f0c9a2b5d6e7f803a4b", Name: n, State: sandbox.Running, CreatedAt: time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC),
		Config: sandbox.Config{Template: sandbox.Template{Image: "x", CPUs: 1, MemoryMiB: 512}, Binding: sandbox.Binding{Env: []string{"TOKEN=secret"}}},
	}
}

func (f *fakeSandboxes) Metrics(_ context.Context, namespaces []string, name string) ([]sandbox.Metrics, error) {
	n := sandbox.Name{Namespace: strings.Join(namespaces, ","), Name: name}
	if err := f.call("metrics", n); err != nil {
		return nil, err
	}
	return []sandbox.Metrics{{Name: n, State: sandbox.Running, CPUPercent: new(12.5), MemoryMiB: new(int64(256)), DiskBytes: new(int64(1 << 40))}}, nil
}

// site is a Handler behind the real gateway, with real keys.
type site struct {
	*servetest.Site
	*Handler
	sandboxes *fakeSandboxes
	key       string // valid for every namespace and scope
}

// slowMachine is how much longer than usual a call may take before its response becomes a stream, so that the responses of most
// tests are JSON however slow the machine is.
const slowMachine = 100

func newSite(t testing.TB, configure ...func(*gateway.Options)) *site {
	t.Helper()
	running := map[sandbox.Name]sandbox.Request{}
	for _, namespace := range []string{"default", "own", "other"} {
		running[sandbox.Name{Namespace: namespace, Name: "a"}] = sandbox.Request{}
	}
	s := &site{sandboxes: &fakeSandboxes{Sandboxes: &servetest.Sandboxes{Running: running, MaxRunTime: time.Hour}}}
	s.Site = servetest.New(t, func(o *servetest.Setup) {
		o.Sandboxes = s.sandboxes
		for _, c := range configure {
			c(&o.Options)
		}
	}, servetest.WithEndpoint(func(methods *serverpc.Service) (gateway.Endpoint, error) {
		h, err := New(methods, "1.2.3")
		if err != nil {
			return gateway.Endpoint{}, err
		}
		s.Handler = h
		return h.Endpoint(), nil
	}))
	s.key = s.Key
	s.maxSilence *= slowMachine
	return s
}

func (s *site) issue(t testing.TB, req keys.IssueRequest) (key, id string) {
	t.Helper()
	return s.IssueNamed(t, req)
}

// withKey is a RoundTripper that adds a key to every request.
type withKey struct {
	http.RoundTripper
	key string
}

func (k withKey) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+k.key)
	return k.RoundTripper.RoundTrip(r)
}

// listen serves s on a loopback port and returns the URL of MCP.
func (s *site) listen(t testing.TB) string {
	t.Helper()
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	return server.URL + rpc.MCPPath
}

// connect connects a client of the SDK that uses the given revision, or its preferred one if revision is empty.
func connect(t testing.TB, url, key, revision string, options *sdk.ClientOptions) (*sdk.ClientSession, error) {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	client := sdk.NewClient(&sdk.Implementation{Name: "test", Version: "1"}, options)
	return client.Connect(t.Context(), &sdk.StreamableClientTransport{
		Endpoint: url, HTTPClient: &http.Client{Transport: withKey{transport, key}}, MaxRetries: -1,
	}, &sdk.ClientSessionOptions{ProtocolVersion: revision})
}

// post sends body as a client of revision 2025-11-25 does, after applying changes to the request.
func (s *site) post(body string, changes ...func(*http.Request)) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, rpc.MCPPath, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json, text/event-stream")
	r.Header.Set("Mcp-Protocol-Version", "2025-11-25")
	r.Header.Set("Authorization", "Bearer "+s.key)
	for _, c := range changes {
		c(r)
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w
}

func header(name, value string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set(name, value) }
}

// toolCall returns the body of a tool call.
func toolCall(id int, tool, arguments string) string {
	return fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":%q,"arguments":%s}}`, id, tool, arguments)
}

// callTool calls a tool with the key of the site and returns its result.
func (s *site) callTool(t testing.TB, tool, arguments string, changes ...func(*http.Request)) *sdk.CallToolResult {
	t.Helper()
	w := s.post(toolCall(1, tool, arguments), changes...)
	var response struct{ Result *sdk.CallToolResult }
	if err := json.Unmarshal(w.Body.Bytes(), &response); err != nil || w.Code != http.StatusOK || response.Result == nil {
		t.Fatalf("%s %.200s: %d %.500s, %v", tool, arguments, w.Code, w.Body, err)
	}
	return response.Result
}

// contents returns the texts of the content of a result. Other content is in brackets.
func contents(res *sdk.CallToolResult) (all []string) {
	for _, c := range res.Content {
		switch c := c.(type) {
		case *sdk.TextContent:
			all = append(all, c.Text)
		case *sdk.ImageContent:
			all = append(all, fmt.Sprintf("[%s %s]", c.MIMEType, c.Data))
		case *sdk.ResourceLink:
			all = append(all, fmt.Sprintf("[link %s %d]", c.URI, *c.Size))
		}
	}
	return all
}

func text(t testing.TB, res *sdk.CallToolResult) string {
	t.Helper()
	if len(res.Content) != 1 {
		t.Fatalf("the result has %d content items, want 1", len(res.Content))
	}
	c, ok := res.Content[0].(*sdk.TextContent)
	if !ok {
		t.Fatalf("the content is %T, want text", res.Content[0])
	}
	return c.Text
}

// wantCalls checks which calls reached the domain since it was last asked.
func wantCalls(t testing.TB, s *site, want ...string) {
	t.Helper()
	if got := s.sandboxes.takeCalls(); !slices.Equal(got, want) {
		t.Errorf("calls that reached the domain: %q, want %q", got, want)
	}
}
