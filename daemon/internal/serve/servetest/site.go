// Package servetest creates a gateway with JSON-RPC and real API keys on top of a fake sandbox domain that runs no
// microVMs. Only tests import it.
package servetest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/keys/keystest"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	serverpc "github.com/msbd/msbd/daemon/internal/serve/rpc"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// Sandboxes is a fake sandbox domain that runs no microVMs. Every operation on a sandbox named in failures fails with
// the error given there.
type Sandboxes struct {
	mu sync.Mutex
	// Running has the sandboxes that were started and not stopped.
	Running map[sandbox.Name]sandbox.Request
	// Origin says how all of them were started.
	Origin  sandbox.Origin
	Timeout time.Duration      // the timeout of the last run or process
	Args    []string           // the arguments of the last command
	Options sandbox.RunOptions // the options of the last run or process
	All     bool               // whether the last signal was for everything that its process started
	// Stubborn processes end only by SIGKILL.
	Stubborn bool
	Attach   sandbox.AttachOptions // the options of the last AttachProcess
	// MaxRunTime is the longest wait for a process.
	MaxRunTime time.Duration
	// Changes are what a watch of files reports. Recursive reports whether the last watch was recursive.
	Changes   chan sandbox.FileChange
	Recursive bool
	// OnRun, if set, is called by every run of code. The run fails with its error.
	OnRun func(context.Context) error

	processes map[sandbox.Name][]*process
	files     map[sandbox.Name]files
	contexts  map[sandbox.Name][]sandbox.Context
}

// failures maps the name of a sandbox to the error of every operation on it.
var failures = map[string]error{
	"gone":     fmt.Errorf("sandbox default/gone does not exist: %w", errdefs.ErrNotFound),
	"other":    fmt.Errorf("sandbox default/other is already running with another configuration: cpus is 1, not 2: %w", errdefs.ErrAlreadyExists),
	"stopping": fmt.Errorf("sandbox default/stopping is stopping: %w", errdefs.ErrFailedPrecondition),
	"clash":    fmt.Errorf("two at once: %w", errdefs.ErrConflict),
	"huge":     fmt.Errorf("cpus 99: this server allows 1 to 2: %w", errdefs.ErrInvalidArgument),
	"quota":    fmt.Errorf("namespace default has all its sandboxes: %w", errdefs.ErrResourceExhausted),
	"slow":     sandbox.ErrRunTimeout,
	"nocmd":    fmt.Errorf("run %q: %w", "nope", sandbox.ErrCommandNotFound),
	"away":     fmt.Errorf("sandbox default/away no longer answers: %w", errdefs.ErrUnavailable),
	"denied":   fmt.Errorf("not this one: %w", errdefs.ErrPermissionDenied),
	"lost":     fmt.Errorf("the connection to the sandbox was lost during the run: %w", sandbox.ErrRunFailed),
	"cut":      fmt.Errorf("start sandbox default/cut: %w", context.Canceled),
	"closing":  rpcerr.ErrStopping,
	"broken":   errors.New("dial unix /run/secret/path: timeout"),
}

// find returns the request with which the sandbox n was started, or the error that its name stands for. For the name
// "panic" it panics.
func (f *Sandboxes) find(n sandbox.Name) (sandbox.Request, error) {
	if err := n.Validate(); err != nil {
		return sandbox.Request{}, err
	}
	if err := failures[n.Name]; err != nil {
		return sandbox.Request{}, err
	}
	if n.Name == "panic" {
		panic("a fault of the domain")
	}
	req, ok := f.Running[n]
	if !ok {
		return req, fmt.Errorf("sandbox %s does not exist: %w", n, errdefs.ErrNotFound)
	}
	return req, nil
}

func (f *Sandboxes) Start(_ context.Context, n sandbox.Name, req sandbox.Request) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	old, err := f.find(n)
	switch {
	case errdefs.IsNotFound(err) && failures[n.Name] == nil:
		f.Running[n] = req
		return nil
	case err != nil:
		return err
	case old.CPUs != req.CPUs || old.Image != req.Image:
		return fmt.Errorf("sandbox %s is already running with another configuration: %w", n, errdefs.ErrAlreadyExists)
	}
	return nil
}

func (f *Sandboxes) Stop(_ context.Context, n sandbox.Name) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.find(n)
	delete(f.Running, n)
	return err
}

// InterruptCode knows every run but "gone".
func (f *Sandboxes) InterruptCode(n sandbox.Name, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.find(n); err != nil {
		return err
	}
	if id == "gone" {
		return fmt.Errorf("no run with this id is in progress: %w", errdefs.ErrNotFound)
	}
	return nil
}

// RunCode prints the language and the code. Some code is special: "print N" prints N bytes, "raise" prints an error and
// exits with 1, "bytes" prints bytes that are not UTF-8, and empty code prints nothing. "overtime TEXT" prints TEXT and reaches
// the time limit, and "lose TEXT" prints TEXT and is lost. With results, "show TEXT" shows TEXT, "fail TEXT" fails with it, both in
// two pieces, and "cut TEXT" sends only the first piece.
func (f *Sandboxes) RunCode(ctx context.Context, n sandbox.Name, code sandbox.Code) (sandbox.Process, error) {
	return &sandboxtest.Process{Context: ctx, Body: func(ctx context.Context) ([]sandbox.Event, int, error) {
		if onRun := f.OnRun; onRun != nil {
			if err := onRun(ctx); err != nil {
				return nil, 0, err
			}
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		if _, err := f.find(n); err != nil {
			return nil, 0, err
		}
		f.Timeout, f.Options = code.Timeout, code.RunOptions
		if n, ok := strings.CutPrefix(code.Text, "print "); ok {
			size, err := strconv.Atoi(n)
			return output(sandbox.Stdout, strings.Repeat("x", size)), 0, err
		}
		if text, ok := strings.CutPrefix(code.Text, "overtime "); ok {
			return output(sandbox.Stdout, text), 0, sandbox.ErrRunTimeout
		}
		if text, ok := strings.CutPrefix(code.Text, "lose "); ok {
			return output(sandbox.Stdout, text), 0, failures["lost"]
		}
		if what, text, ok := strings.Cut(code.Text, " "); ok && code.Results && (what == "show" || what == "fail" || what == "cut") {
			failed := what == "fail"
			events := []sandbox.Event{sandbox.Piece{Error: failed, Data: []byte(text[:len(text)/2]), First: true}}
			if what != "cut" {
				events = append(events, sandbox.Piece{Error: failed, Data: []byte(text[len(text)/2:]), Last: true})
			}
			if failed {
				return events, 1, nil
			}
			return events, 0, nil
		}
		switch code.Text {
		case "":
			return nil, 0, nil
		case "raise":
			return output(sandbox.Stderr, "ValueError\n"), 1, nil
		case "bytes":
			return output(sandbox.Stdout, "a\xffb\n"), 0, nil
		}
		return output(sandbox.Stdout, cmp.Or(code.Context, string(code.Language))+": "+code.Text+"\n"), 0, nil
	}}, nil
}

// output returns the events of a process that printed text to stream.
func output(stream sandbox.Stream, text string) []sandbox.Event {
	return []sandbox.Event{sandbox.Output{Stream: stream, Data: []byte(text)}}
}

// RunCommand prints the arguments. The command "false" prints nothing and exits with 1, and "cat" prints the input.
func (f *Sandboxes) RunCommand(ctx context.Context, n sandbox.Name, command sandbox.Command) (sandbox.Process, error) {
	return &sandboxtest.Process{Context: ctx, Body: func(context.Context) ([]sandbox.Event, int, error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		if _, err := f.find(n); err != nil {
			return nil, 0, err
		}
		f.Timeout, f.Args, f.Options = command.Timeout, command.Args, command.RunOptions
		if command.Program == "false" {
			return nil, 1, nil
		}
		if command.Program == "cat" {
			return output(sandbox.Stdout, string(command.Input)), 0, nil
		}
		return output(sandbox.Stdout, strings.Join(command.Args, " ")+"\n"), 0, nil
	}}, nil
}

// record returns the record of a sandbox that was started with req. A sandbox named "failed" has failed. The caller holds mu.
func (f *Sandboxes) record(n sandbox.Name, req sandbox.Request) sandbox.Record {
	rec := sandbox.Record{
		ID: "00112233445566778899", Name: n, State: sandbox.Running, Origin: f.Origin, CreatedAt: time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC),
		Config: sandbox.Config{Template: sandbox.Template{Image: cmp.Or(req.Image, "microsandbox/python"), CPUs: cmp.Or(req.CPUs, 1), MemoryMiB: cmp.Or(req.MemoryMiB, 512), DiskMiB: req.DiskMiB}, Binding: sandbox.Binding{Env: req.Env, Workdir: req.Workdir, User: req.User, Hostname: req.Hostname}},
	}
	if n.Name == "failed" {
		rec.State, rec.Reason, rec.Cause = sandbox.Failed, "its start failed", "dial unix /run/secret/path: timeout"
	}
	return rec
}

func (f *Sandboxes) ListIn(namespaces []string) ([]sandbox.Record, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var recs []sandbox.Record
	for _, n := range slices.SortedFunc(maps.Keys(f.Running), func(a, b sandbox.Name) int { return strings.Compare(a.String(), b.String()) }) {
		if len(namespaces) == 0 || slices.Contains(namespaces, n.Namespace) {
			recs = append(recs, f.record(n, f.Running[n]))
		}
	}
	return recs, nil
}

func (f *Sandboxes) Get(n sandbox.Name) (sandbox.Record, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	req, err := f.find(n)
	return f.record(n, req), err
}

// Metrics returns the same figures for every sandbox. A sandbox named "failed" has none because it does not run, and one
// named "mute" because it cannot be measured.
func (f *Sandboxes) Metrics(_ context.Context, namespaces []string, name string) ([]sandbox.Metrics, error) {
	recs, _ := f.ListIn(namespaces)
	var all []sandbox.Metrics
	for _, rec := range recs {
		if name != "" && rec.Name.Name != name {
			continue
		}
		m := sandbox.Metrics{Name: rec.Name, State: rec.State, Reason: rec.Reason}
		if m.State == sandbox.Running && rec.Name.Name != "mute" {
			m.CPUPercent, m.MemoryMiB, m.DiskBytes = new(12.5), new(int64(256)), new(int64(1<<40))
		}
		all = append(all, m)
	}
	if name != "" && all == nil {
		return nil, fmt.Errorf("sandbox %s/%s does not exist: %w", strings.Join(namespaces, ","), name, errdefs.ErrNotFound)
	}
	return all, nil
}

// Version is the version of msbd that a Site reports.
const Version = "1.2.3"

// Site is a gateway with everything that it depends on.
type Site struct {
	*gateway.Gateway
	Service   *serverpc.Service
	Sandboxes *Sandboxes
	Log       *LogBuffer
	Keys      *keys.Issuer
	Key       string // an API key with every scope, for every namespace

	keyOptions keys.Options
	configure  []func(*Setup)
}

// LogBuffer collects a log in memory. It is safe for concurrent use.
type LogBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *LogBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *LogBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func (b *LogBuffer) Reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text.Reset()
}

// Setup holds the parts of a Site that a test may change before New creates it.
type Setup struct {
	gateway.Options
	Sandboxes    serverpc.Sandboxes
	newEndpoints []func(*serverpc.Service) (gateway.Endpoint, error)
}

// WithEndpoint adds an endpoint that needs the JSON-RPC service, such as the MCP endpoint.
func WithEndpoint(newEndpoint func(*serverpc.Service) (gateway.Endpoint, error)) func(*Setup) {
	return func(o *Setup) { o.newEndpoints = append(o.newEndpoints, newEndpoint) }
}

// New creates a Site. Each configure function may change the Setup.
func New(t testing.TB, configure ...func(*Setup)) *Site {
	t.Helper()
	s := &Site{
		Sandboxes: &Sandboxes{Running: map[sandbox.Name]sandbox.Request{}, MaxRunTime: time.Millisecond}, Log: &LogBuffer{}, configure: configure,
		keyOptions: keys.Options{KeyringPath: filepath.Join(t.TempDir(), "keys", "keyring.json"), Store: keystest.NewMemoryStore()},
	}
	s.open(t)
	s.Key = s.Issue(t, keys.IssueRequest{})
	return s
}

// Restart returns a new Site with the keys, the sandboxes and the log of s, like a restart of the server.
func (s *Site) Restart(t testing.TB) *Site {
	t.Helper()
	s = &Site{Sandboxes: s.Sandboxes, Log: s.Log, Key: s.Key, configure: s.configure, keyOptions: s.keyOptions}
	s.open(t)
	return s
}

// open opens the keys and creates the gateway.
func (s *Site) open(t testing.TB) {
	t.Helper()
	log := bounded.NewLogger(s.Log, false, slog.LevelInfo)
	s.keyOptions.Log = log
	issuer, verifier, err := keys.Open(s.keyOptions)
	if err != nil {
		t.Fatal(err)
	}
	s.Keys = issuer
	o := Setup{Options: gateway.Options{Verifier: verifier, Metrics: prometheus.NewRegistry(), Log: log}, Sandboxes: s.Sandboxes}
	for _, c := range s.configure {
		c(&o)
	}
	if s.Service, err = serverpc.New(o.Sandboxes, Version, o.Metrics); err != nil {
		t.Fatal(err)
	}
	o.Endpoints = append(o.Endpoints, s.Service.Endpoints()...)
	for _, newEndpoint := range o.newEndpoints {
		e, err := newEndpoint(s.Service)
		if err != nil {
			t.Fatal(err)
		}
		o.Endpoints = append(o.Endpoints, e)
	}
	if s.Gateway, err = gateway.New(o.Options); err != nil {
		t.Fatal(err)
	}
}

// Issue creates an API key.
func (s *Site) Issue(t testing.TB, req keys.IssueRequest) string {
	t.Helper()
	key, _ := s.IssueNamed(t, req)
	return key
}

// IssueNamed is like Issue but also returns the id of the key.
func (s *Site) IssueNamed(t testing.TB, req keys.IssueRequest) (key, id string) {
	t.Helper()
	secret, record, err := s.Keys.Issue(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return secret.Reveal(), record.ID
}

// Post handles a POST of body to the JSON-RPC path with the site's key, without a connection. Each of changes may
// change the request first.
func (s *Site) Post(body string, changes ...func(*http.Request)) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, rpc.Path, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+s.Key)
	for _, c := range changes {
		c(r)
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w
}

// WithKey sets the Authorization header to key, which replaces the site's key.
func WithKey(key string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set("Authorization", key) }
}

// At sets the method and the path.
func At(method, path string) func(*http.Request) {
	return func(r *http.Request) { r.Method, r.URL.Path = method, path }
}

// WithHeader sets a header.
func WithHeader(name, value string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set(name, value) }
}

// Request returns the JSON-RPC request for a call of method. params is JSON.
func Request(method, params string) string {
	return fmt.Sprintf(`{"jsonrpc":"2.0","method":%q,"params":%s,"id":1}`, method, params)
}

// WantError checks that a response has the given status and that its body is only a JSON-RPC error with the given code.
// It returns that error.
func WantError(t *testing.T, w *httptest.ResponseRecorder, status int, code rpc.Code) *rpc.Error {
	t.Helper()
	var res rpc.Response
	if err := json.Unmarshal(w.Body.Bytes(), &res, json.RejectUnknownMembers(true)); err != nil {
		t.Fatalf("response %d %q is not a JSON-RPC response: %v", w.Code, w.Body, err)
	}
	if w.Code != status || res.Error == nil || res.Error.Code != code || res.Result != nil || res.Error.Message == "" {
		t.Fatalf("response is %d %s, want %d with only an error of code %d", w.Code, w.Body, status, code)
	}
	return res.Error
}

// WantOK checks that a response is a 200 with a result.
func WantOK(t *testing.T, w *httptest.ResponseRecorder) {
	t.Helper()
	if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), `"result":`) {
		t.Fatalf("response is %d %s, want 200 with a result", w.Code, w.Body)
	}
}
