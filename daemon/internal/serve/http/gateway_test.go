package http

import (
	"bytes"
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

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/keys/keystest"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// fakeSandboxes is the domain without microVMs. The sandboxes of failures exist only to fail.
type fakeSandboxes struct {
	mu      sync.Mutex
	boxes   map[sandbox.Name]sandbox.Request
	timeout time.Duration // of the last run
	args    []string      // of the last command
	// onRun, when set, is called by every run.
	onRun func(context.Context) error
}

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
	"cut":      fmt.Errorf("start sandbox default/cut: %w", context.Canceled),
	"broken":   errors.New("dial unix /run/secret/path: timeout"),
}

func (f *fakeSandboxes) find(n sandbox.Name) (sandbox.Request, error) {
	if err := n.Validate(); err != nil {
		return sandbox.Request{}, err
	}
	if err := failures[n.Name]; err != nil {
		return sandbox.Request{}, err
	}
	if n.Name == "panic" {
		panic("a fault of the domain")
	}
	req, ok := f.boxes[n]
	if !ok {
		return req, fmt.Errorf("sandbox %s does not exist: %w", n, errdefs.ErrNotFound)
	}
	return req, nil
}

func (f *fakeSandboxes) Start(_ context.Context, n sandbox.Name, req sandbox.Request) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	old, err := f.find(n)
	switch {
	case errdefs.IsNotFound(err) && failures[n.Name] == nil:
		f.boxes[n] = req
		return nil
	case err != nil:
		return err
	case old.CPUs != req.CPUs || old.Image != req.Image:
		return fmt.Errorf("sandbox %s is already running with another configuration: %w", n, errdefs.ErrAlreadyExists)
	}
	return nil
}

func (f *fakeSandboxes) Stop(_ context.Context, n sandbox.Name) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.find(n)
	delete(f.boxes, n)
	return err
}

func (f *fakeSandboxes) RunCode(ctx context.Context, n sandbox.Name, run sandbox.CodeRun) (res sandbox.CodeResult, err error) {
	if f.onRun != nil {
		if err := f.onRun(ctx); err != nil {
			return res, err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.find(n); err != nil {
		return res, err
	}
	f.timeout = run.Timeout
	if n, ok := strings.CutPrefix(run.Code, "print "); ok { // so many bytes
		size, err := strconv.Atoi(n)
		if err == nil {
			err = run.Keep(size)
		}
		return sandbox.CodeResult{Success: true, Output: []sandbox.Line{{Stream: sandbox.Stdout, Text: strings.Repeat("x", size)}}}, err
	}
	switch run.Code {
	case "":
		return sandbox.CodeResult{Success: true}, nil
	case "raise":
		return sandbox.CodeResult{Output: []sandbox.Line{{Stream: sandbox.Stderr, Text: "ValueError"}}}, nil
	case "bytes":
		return sandbox.CodeResult{Success: true, Output: []sandbox.Line{{Stream: sandbox.Stdout, Text: "a\xffb"}}}, nil
	}
	return sandbox.CodeResult{Success: true, Output: []sandbox.Line{{Stream: sandbox.Stdout, Text: string(run.Language) + ": " + run.Code}}}, nil
}

func (f *fakeSandboxes) RunCommand(_ context.Context, n sandbox.Name, run sandbox.CommandRun) (res sandbox.CommandResult, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.find(n); err != nil {
		return res, err
	}
	f.timeout, f.args = run.Timeout, run.Args
	if run.Command == "false" {
		return sandbox.CommandResult{ExitCode: 1}, nil
	}
	return sandbox.CommandResult{Output: []sandbox.Line{{Stream: sandbox.Stdout, Text: strings.Join(run.Args, " ")}}}, nil
}

func (f *fakeSandboxes) Metrics(_ context.Context, namespace, name string) ([]sandbox.Metrics, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []sandbox.Metrics
	for _, n := range slices.SortedFunc(maps.Keys(f.boxes), func(a, b sandbox.Name) int { return strings.Compare(a.String(), b.String()) }) {
		if (namespace != "" && n.Namespace != namespace) || (name != "" && n.Name != name) {
			continue
		}
		m := sandbox.Metrics{Name: n, Running: n.Name != "failed"}
		if m.Running {
			m.CPUPercent, m.MemoryMiB, m.DiskBytes = 12.5, new(int64(256)), new(int64(1<<40))
		}
		all = append(all, m)
	}
	if name != "" && all == nil {
		return nil, fmt.Errorf("sandbox %s/%s does not exist: %w", namespace, name, errdefs.ErrNotFound)
	}
	return all, nil
}

// site is a gateway with everything that it needs.
type site struct {
	*Gateway
	boxes *fakeSandboxes
	log   *logBuffer
	keys  *keys.Issuer
	key   string // of every namespace and scope
}

// logBuffer is a log that many may write.
type logBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func (b *logBuffer) Reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text.Reset()
}

func newSite(t testing.TB, configure ...func(*Options)) *site {
	t.Helper()
	s := &site{boxes: &fakeSandboxes{boxes: map[sandbox.Name]sandbox.Request{}}, log: &logBuffer{}}
	log := slog.New(slog.NewTextHandler(s.log, nil))
	issuer, verifier, err := keys.Open(keys.Options{
		KeyringPath: filepath.Join(t.TempDir(), "keys", "keyring.json"), Store: keystest.NewMemoryStore(), Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.keys = issuer
	s.key = s.issue(t, keys.IssueRequest{})
	o := Options{Verifier: verifier, Sandboxes: s.boxes, Log: log}
	for _, c := range configure {
		c(&o)
	}
	if s.Gateway, err = New(o); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) issue(t testing.TB, req keys.IssueRequest) string {
	t.Helper()
	key, _ := s.issueNamed(t, req)
	return key
}

func (s *site) issueNamed(t testing.TB, req keys.IssueRequest) (key, id string) {
	t.Helper()
	secret, record, err := s.keys.Issue(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return secret.Reveal(), record.ID
}

// post sends a body with the site's key. Changes apply to the request before it is sent.
func (s *site) post(body string, changes ...func(*http.Request)) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, rpc.Path, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+s.key)
	for _, c := range changes {
		c(r)
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w
}

func withKey(key string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set("Authorization", key) }
}

func at(method, path string) func(*http.Request) {
	return func(r *http.Request) { r.Method, r.URL.Path = method, path }
}

func withHeader(name, value string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set(name, value) }
}

// request is the body of a call.
func request(method, params string) string {
	return fmt.Sprintf(`{"jsonrpc":"2.0","method":%q,"params":%s,"id":1}`, method, params)
}

// wantError checks an answer's status and that its body is an error envelope of that code.
func wantError(t *testing.T, w *httptest.ResponseRecorder, status int, code rpc.Code) *rpc.Error {
	t.Helper()
	var res rpc.Response
	if err := json.Unmarshal(w.Body.Bytes(), &res, json.RejectUnknownMembers(true)); err != nil {
		t.Fatalf("answer %d %q is no envelope: %v", w.Code, w.Body, err)
	}
	if w.Code != status || res.Error == nil || res.Error.Code != code || res.Result != nil || res.Error.Message == "" {
		t.Fatalf("answer is %d %s, want %d with code %d alone", w.Code, w.Body, status, code)
	}
	return res.Error
}

func wantOK(t *testing.T, w *httptest.ResponseRecorder) {
	t.Helper()
	if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), `"result":`) {
		t.Fatalf("answer is %d %s, want a result", w.Code, w.Body)
	}
}
