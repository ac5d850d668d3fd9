package mcp

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

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

// boxes is the domain without microVMs: every sandbox is there but "gone", and what gets through to it is
// remembered.
type boxes struct {
	mu    sync.Mutex
	calls []string
	// onRun, when set, is called by every run of code.
	onRun func(context.Context) error
}

func (b *boxes) call(what string, n sandbox.Name) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls = append(b.calls, what+" "+n.String())
	if n.Name == "gone" {
		return fmt.Errorf("sandbox %s does not exist: %w", n, errdefs.ErrNotFound)
	}
	return nil
}

// passed returns what got through since it was last asked.
func (b *boxes) passed() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	calls := b.calls
	b.calls = nil
	return calls
}

func (b *boxes) Start(_ context.Context, n sandbox.Name, r sandbox.Request) error {
	if r.MemoryMiB < 0 {
		panic("a fault of the domain")
	}
	return b.call("start", n)
}
func (b *boxes) Stop(_ context.Context, n sandbox.Name) error { return b.call("stop", n) }

func (b *boxes) RunCode(ctx context.Context, n sandbox.Name, r sandbox.Code) (sandbox.Process, error) {
	return &sandboxtest.Process{Context: ctx, Body: func(ctx context.Context) ([]sandbox.Event, int, error) {
		if err := b.call("code", n); err != nil {
			return nil, 0, err
		}
		if b.onRun != nil {
			if err := b.onRun(ctx); err != nil {
				return nil, 0, err
			}
		}
		if count, what, ok := strings.Cut(r.Text, " MiB of "); ok {
			n, err := strconv.Atoi(count)
			return []sandbox.Event{sandbox.Output{Stream: sandbox.Stdout, Data: []byte(strings.Repeat(what, n<<20))}}, 0, err
		}
		out := []sandbox.Event{sandbox.Output{Stream: sandbox.Stdout, Data: []byte("ran " + r.Text + "\n")}}
		if r.Text == "raise" {
			return append(out, sandbox.Output{Stream: sandbox.Stderr, Data: []byte("ValueError\n")}), 1, nil
		}
		return out, 0, nil
	}}, nil
}

func (b *boxes) RunCommand(ctx context.Context, n sandbox.Name, r sandbox.Command) (sandbox.Process, error) {
	return &sandboxtest.Process{Context: ctx, Body: func(context.Context) ([]sandbox.Event, int, error) {
		if err := b.call("command", n); err != nil {
			return nil, 0, err
		}
		if r.Program == "false" {
			return nil, 1, nil
		}
		return []sandbox.Event{sandbox.Output{Stream: sandbox.Stdout, Data: []byte(strings.Join(r.Args, " ") + "\n")}}, 0, nil
	}}, nil
}

func (b *boxes) Metrics(_ context.Context, namespace, name string) ([]sandbox.Metrics, error) {
	n := sandbox.Name{Namespace: namespace, Name: name}
	if err := b.call("metrics", n); err != nil {
		return nil, err
	}
	return []sandbox.Metrics{{Name: n, Running: true, CPUPercent: 12.5, MemoryMiB: new(int64(256)), DiskBytes: new(int64(1 << 40))}}, nil
}

// site is MCP behind the real gateway and real keys.
type site struct {
	*servetest.Site
	*Handler
	boxes *boxes
	key   string // of every namespace and scope
}

func newSite(t testing.TB, configure ...func(*gateway.Options)) *site {
	t.Helper()
	s := &site{boxes: &boxes{}}
	s.Site = servetest.New(t, func(o *servetest.Setup) {
		o.Sandboxes = s.boxes
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
	return s
}

func (s *site) issue(t testing.TB, req keys.IssueRequest) (key, id string) {
	t.Helper()
	return s.IssueNamed(t, req)
}

// withKey adds a key to every request of a client.
type withKey struct {
	http.RoundTripper
	key string
}

func (k withKey) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+k.key)
	return k.RoundTripper.RoundTrip(r)
}

// listen serves s on a port of this machine and returns the URL of MCP.
func (s *site) listen(t testing.TB) string {
	t.Helper()
	web := httptest.NewServer(s)
	t.Cleanup(web.Close)
	return web.URL + rpc.MCPPath
}

// connect makes a client of others, which speaks a revision. An empty one is that which it likes best.
func connect(t testing.TB, url, key, revision string, options *sdk.ClientOptions) (*sdk.ClientSession, error) {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	client := sdk.NewClient(&sdk.Implementation{Name: "test", Version: "1"}, options)
	return client.Connect(t.Context(), &sdk.StreamableClientTransport{
		Endpoint: url, HTTPClient: &http.Client{Transport: withKey{transport, key}}, MaxRetries: -1,
	}, &sdk.ClientSessionOptions{ProtocolVersion: revision})
}

// post sends a body as a client of the revision 2025-11-25 does. Changes apply before it is sent.
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

// toolCall is the body of a tool call.
func toolCall(id int, tool, arguments string) string {
	return fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":%q,"arguments":%s}}`, id, tool, arguments)
}

func text(t testing.TB, res *sdk.CallToolResult) string {
	t.Helper()
	if len(res.Content) != 1 {
		t.Fatalf("the result has %d pieces of content", len(res.Content))
	}
	c, ok := res.Content[0].(*sdk.TextContent)
	if !ok {
		t.Fatalf("the content is %T", res.Content[0])
	}
	return c.Text
}

func wantPassed(t testing.TB, s *site, want ...string) {
	t.Helper()
	if got := s.boxes.passed(); !slices.Equal(got, want) {
		t.Errorf("there got through %q, want %q", got, want)
	}
}
