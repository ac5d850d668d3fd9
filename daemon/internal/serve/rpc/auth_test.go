package rpc_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	serverpc "github.com/msbd/msbd/daemon/internal/serve/rpc"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// recorder is a sandbox domain that only records the calls that reach it.
type recorder struct {
	mu    sync.Mutex
	calls []string
}

func (r *recorder) record(what, namespace string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, what+" in "+namespace)
	return nil
}

// takeCalls returns the calls since the last takeCalls.
func (r *recorder) takeCalls() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	calls := r.calls
	r.calls = nil
	return calls
}

func (r *recorder) Start(_ context.Context, n sandbox.Name, _ sandbox.Request) error {
	return r.record("start", n.Namespace)
}
func (r *recorder) Stop(_ context.Context, n sandbox.Name) error {
	return r.record("stop", n.Namespace)
}
func (r *recorder) RunCode(ctx context.Context, n sandbox.Name, _ sandbox.Code) (sandbox.Process, error) {
	return silentProcess(ctx), r.record("code", n.Namespace)
}
func (r *recorder) InterruptCode(n sandbox.Name, _ string) error {
	return r.record("interrupt", n.Namespace)
}
func (r *recorder) RunCommand(ctx context.Context, n sandbox.Name, _ sandbox.Command) (sandbox.Process, error) {
	return silentProcess(ctx), r.record("command", n.Namespace)
}

// silentProcess returns a process that prints nothing and exits with 0.
func silentProcess(ctx context.Context) sandbox.Process {
	return &sandboxtest.Process{Context: ctx, Body: func(context.Context) ([]sandbox.Event, int, error) { return nil, 0, nil }}
}
func (r *recorder) ListIn(namespaces []string) ([]sandbox.Record, error) {
	return nil, r.record("list", strings.Join(namespaces, ","))
}
func (r *recorder) Get(n sandbox.Name) (sandbox.Record, error) {
	return sandbox.Record{}, r.record("get", n.Namespace)
}
func (r *recorder) Metrics(_ context.Context, namespaces []string, _ string) ([]sandbox.Metrics, error) {
	return nil, r.record("metrics", strings.Join(namespaces, ","))
}

func (r *recorder) CreateContext(_ context.Context, n sandbox.Name, _ sandbox.ContextRequest) (sandbox.Context, error) {
	return sandbox.Context{}, r.record("create context", n.Namespace)
}
func (r *recorder) ListContexts(_ context.Context, n sandbox.Name) ([]sandbox.Context, error) {
	return nil, r.record("list contexts", n.Namespace)
}
func (r *recorder) RestartContext(_ context.Context, n sandbox.Name, _ string) (sandbox.Context, error) {
	return sandbox.Context{}, r.record("restart context", n.Namespace)
}
func (r *recorder) RemoveContext(_ context.Context, n sandbox.Name, _ string) error {
	return r.record("remove context", n.Namespace)
}
func (r *recorder) StartProcess(ctx context.Context, n sandbox.Name, _ sandbox.ProcessRequest) (sandbox.Process, error) {
	return startedProcess(ctx), r.record("start process", n.Namespace)
}
func (r *recorder) AttachProcess(ctx context.Context, n sandbox.Name, _ sandbox.ProcessID, _ sandbox.AttachOptions) (sandbox.Process, error) {
	return startedProcess(ctx), r.record("attach process", n.Namespace)
}

// startedProcess is like silentProcess, with the event of the start.
func startedProcess(ctx context.Context) sandbox.Process {
	return &sandboxtest.Process{Context: ctx, Body: func(context.Context) ([]sandbox.Event, int, error) {
		return []sandbox.Event{sandbox.Started{PID: 1}}, 0, nil
	}}
}
func (r *recorder) ListProcesses(_ context.Context, n sandbox.Name, each func(sandbox.ProcessInfo) error) error {
	return errors.Join(each(sandbox.ProcessInfo{PID: 1, Tag: anyText}), r.record("list processes", n.Namespace))
}
func (r *recorder) WriteInput(_ context.Context, n sandbox.Name, _ sandbox.ProcessID, _ io.Reader, _ bool) error {
	return r.record("input", n.Namespace)
}
func (r *recorder) SignalProcess(_ context.Context, n sandbox.Name, _ sandbox.ProcessID, _ int, _ bool) error {
	return r.record("signal", n.Namespace)
}
func (r *recorder) ResizeTerminal(_ context.Context, n sandbox.Name, _ sandbox.ProcessID, _ sandbox.TerminalSize) error {
	return r.record("resize", n.Namespace)
}
func (r *recorder) TimeLimit(time.Duration) time.Duration { return time.Minute }
func (r *recorder) StatFile(_ context.Context, n sandbox.Name, _ sandbox.Path, _ bool) (sandbox.FileInfo, error) {
	return sandbox.FileInfo{}, r.record("stat", n.Namespace)
}
func (r *recorder) ListFiles(_ context.Context, n sandbox.Name, _ sandbox.Path, _ int, _ func(sandbox.FileInfo) error) error {
	return r.record("list files", n.Namespace)
}
func (r *recorder) ReadFile(_ context.Context, n sandbox.Name, _ sandbox.Path, _, _ int64) (sandbox.FileInfo, io.ReadCloser, error) {
	return sandbox.FileInfo{}, io.NopCloser(strings.NewReader("")), r.record("read", n.Namespace)
}
func (r *recorder) WriteFile(_ context.Context, n sandbox.Name, _ sandbox.Path, _ sandbox.WriteOptions, _ io.Reader) (sandbox.FileInfo, bool, error) {
	return sandbox.FileInfo{}, true, r.record("write", n.Namespace)
}
func (r *recorder) MakeDirectory(_ context.Context, n sandbox.Name, _ sandbox.Path, _ *uint32) (sandbox.FileInfo, bool, error) {
	return sandbox.FileInfo{}, true, r.record("mkdir", n.Namespace)
}
func (r *recorder) MoveFile(_ context.Context, n sandbox.Name, _, _ sandbox.Path) (sandbox.FileInfo, error) {
	return sandbox.FileInfo{}, r.record("move", n.Namespace)
}
func (r *recorder) RemoveFile(_ context.Context, n sandbox.Name, _ sandbox.Path, _ bool) error {
	return r.record("remove", n.Namespace)
}
func (r *recorder) WatchFiles(_ context.Context, n sandbox.Name, _ sandbox.Path, _ sandbox.WatchOptions) (sandbox.Watch, error) {
	return endedWatch{}, r.record("watch", n.Namespace)
}

// endedWatch reports no changes.
type endedWatch struct{}

func (endedWatch) Next() (sandbox.FileChange, error) { return sandbox.FileChange{}, io.EOF }
func (endedWatch) Close() error                      { return nil }

// anyText is valid as a sandbox name, a language, a command, code, a tag and a path.
const anyText = "python"

// paramsFor returns params with a value for every required param of a method, and the namespace unless it is empty.
func paramsFor(t *testing.T, m serverpc.Method, namespace string) string {
	t.Helper()
	params := map[string]any{}
	if namespace != "" {
		params["namespace"] = namespace
	}
	if slices.Contains(m.Params, "pid") { // or a tag is required
		params["tag"] = anyText
	}
	if slices.Contains(m.Params, "language") { // or a context is required
		params["language"] = anyText
	}
	for _, name := range m.Required {
		switch {
		case name == "signal":
			params[name] = "TERM"
		case m.Schema.Properties[name].Type == "integer":
			params[name] = 1
		default:
			params[name] = anyText
		}
	}
	b, err := json.Marshal(params, json.Deterministic(true))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// target is one operation that the gateway offers.
type target struct {
	name  string
	scope keys.Scope // the scope it needs; empty if any valid key will do
	// send requests the operation. An empty namespace is left out of the request.
	send func(key, namespace string) *httptest.ResponseRecorder
	// inNamespace reports whether the operation runs in a namespace; the others do not depend on one.
	inNamespace bool
}

// targets returns every operation that needs a key, taken from the tables of endpoints and methods: every method on
// every path, and every GET path.
func targets(t *testing.T, s *Site) (all []target) {
	t.Helper()
	for _, e := range s.Endpoints {
		if e.Scope == gateway.Open {
			continue
		}
		httpMethod, path, _ := strings.Cut(e.Pattern, " ")
		send := func(body, key string, changes ...func(*http.Request)) *httptest.ResponseRecorder {
			return s.Post(body, append(changes, WithKey(key), At(httpMethod, path))...)
		}
		if httpMethod == http.MethodGet { // a GET pattern also serves HEAD
			for _, httpMethod := range []string{http.MethodGet, http.MethodHead} {
				all = append(all, target{
					name: httpMethod + " " + path, scope: e.Scope,
					send: func(key, _ string) *httptest.ResponseRecorder { return s.Post("", WithKey(key), At(httpMethod, path)) },
				})
			}
			continue
		}
		all = append(all, target{
			name: path + " " + rpc.MethodDiscover,
			send: func(key, _ string) *httptest.ResponseRecorder { return send(Request(rpc.MethodDiscover, "{}"), key) },
		})
		for _, m := range s.Service.Table() {
			all = append(all, target{
				name: path + " " + m.Name, scope: m.Scope, inNamespace: true,
				send: func(key, namespace string) *httptest.ResponseRecorder {
					var changes []func(*http.Request)
					if m.OnlyEvents {
						changes = append(changes, WithHeader("Accept", rpc.EventStream))
					}
					return send(Request(m.Name, paramsFor(t, m, namespace)), key, changes...)
				},
			})
		}
	}
	return all
}

// TestAuthorization requests every operation with every kind of key. New endpoints and methods are covered
// automatically.
func TestAuthorization(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		domain := &recorder{}
		s := New(t, func(o *Setup) { o.Sandboxes = domain })
		targets := targets(t, s)
		if len(targets) < 122 { // 29 methods and rpc.discover on 4 paths, and GET and HEAD of /metrics
			t.Fatalf("got only %d targets", len(targets))
		}
		// used makes the gateway accept key once, so that its session is cached: a cached session must not keep a key
		// valid that has expired or was revoked.
		used := func(key string) string {
			WantOK(t, s.Post(Request("rpc.discover", "{}"), WithKey(key)))
			return key
		}
		signed := used(s.Key)
		if _, err := s.Keys.Reset(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		issue := func(req keys.IssueRequest) (key, id string) {
			key, id = s.IssueNamed(t, req)
			return used(key), id
		}
		good, _ := issue(keys.IssueRequest{})
		expired, _ := issue(keys.IssueRequest{Expire: "1s"})
		revoked, id := issue(keys.IssueRequest{})
		if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
			t.Fatal(err)
		}
		pruned, id := issue(keys.IssueRequest{})
		if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Keys.Prune(t.Context(), "", false, 0); err != nil {
			t.Fatal(err)
		}
		rotated, id := issue(keys.IssueRequest{})
		if _, _, _, err := s.Keys.Rotate(t.Context(), keys.RotateRequest{Ref: id}); err != nil {
			t.Fatal(err)
		}
		graced, id := issue(keys.IssueRequest{})
		if _, _, _, err := s.Keys.Rotate(t.Context(), keys.RotateRequest{Ref: id, Grace: "1h"}); err != nil {
			t.Fatal(err)
		}
		used(graced)
		time.Sleep(2 * time.Hour)

		invalid := map[string]string{
			"no key": "", "scheme alone": "Bearer", "no token": "Bearer ", "other scheme": "Basic " + good, "two keys": good + " " + good,
			"malformed": "msb_nonsense", "prefix alone": "Bearer msb_", "altered": good[:len(good)-1] + "!", "truncated": good[:len(good)-1],
			"too long": good + "A", "key of another server": New(t).Key,
			"expired": "Bearer " + expired, "revoked": revoked, "pruned": pruned, "reset": signed,
			"rotated": rotated, "rotated, grace period over": "Bearer " + graced,
		}
		var refusal *httptest.ResponseRecorder
		for _, target := range targets {
			for name, key := range invalid {
				w := target.send(key, "team-beta")
				WantError(t, w, http.StatusUnauthorized, rpc.CodeUnauthenticated)
				w.Header().Del("X-Request-Id")
				if refusal == nil {
					refusal = w
				}
				if !bytes.Equal(w.Body.Bytes(), refusal.Body.Bytes()) || fmt.Sprint(w.Header()) != fmt.Sprint(refusal.Header()) {
					t.Errorf("%s with key %q: got %v %s, which differs from %v %s", target.name, name, w.Header(), w.Body, refusal.Header(), refusal.Body)
				}
				if w.Header().Get("WWW-Authenticate") != "Bearer" {
					t.Errorf("%s with key %q: the response has no WWW-Authenticate: Bearer", target.name, name)
				}
				time.Sleep(time.Second) // stay below the limit on bad keys, which has its own test
			}
		}
		if got := domain.takeCalls(); got != nil {
			t.Fatal("calls without a valid key reached the domain:", got)
		}

		team := s.Issue(t, keys.IssueRequest{Namespaces: []string{"team-alpha"}})
		teams := s.Issue(t, keys.IssueRequest{Namespaces: []string{"team-alpha", "team-gamma"}})
		secrets := []string{signed, good, expired, revoked, pruned, rotated, graced, team, teams}
		for _, target := range targets {
			denied := func(key, namespace string, mentions ...string) {
				t.Helper()
				e := WantError(t, target.send(key, namespace), http.StatusForbidden, rpc.CodePermissionDenied)
				for _, what := range mentions {
					if !strings.Contains(e.Message, what) {
						t.Errorf("%s: message %q does not mention %s", target.name, e.Message, what)
					}
				}
				if got := domain.takeCalls(); got != nil {
					t.Errorf("%s: refused call reached the domain: %v", target.name, got)
				}
			}
			allowed := func(key, namespace, in string) {
				t.Helper()
				if w := target.send(key, namespace); w.Code != http.StatusOK || strings.Contains(w.Body.String(), "event: error") {
					t.Errorf("%s in %q: %d %s", target.name, namespace, w.Code, w.Body)
				}
				got := domain.takeCalls()
				elsewhere := func(call string) bool { return !strings.HasSuffix(call, " in "+in) }
				if target.inNamespace && (len(got) == 0 || slices.ContainsFunc(got, elsewhere)) || !target.inNamespace && got != nil {
					t.Errorf("%s in %q: calls that reached the domain: %v", target.name, namespace, got)
				}
			}
			allowed(good, "team-beta", "team-beta")
			allowed(good, "", "default")
			if target.scope != "" {
				weak, strong := keys.IssueRequest{}, keys.IssueRequest{Scopes: []keys.Scope{target.scope}}
				for _, scope := range keys.Scopes {
					if scope != target.scope {
						weak.Scopes = append(weak.Scopes, scope)
					}
				}
				weakKey, strongKey := s.Issue(t, weak), s.Issue(t, strong)
				secrets = append(secrets, weakKey, strongKey)
				denied(weakKey, "team-alpha", string(target.scope))
				allowed(strongKey, "team-alpha", "team-alpha")
			}
			switch {
			case target.inNamespace:
				denied(team, "team-beta", `"team-alpha"`, `"team-beta"`)
				denied(team, "default", `"team-alpha"`, `"default"`)
				denied(teams, "team-beta", `"team-alpha"`, `"team-gamma"`, `"team-beta"`)
				denied(teams, "", `"team-alpha"`, `"team-gamma"`, `"default"`)
				allowed(team, "", "team-alpha")
				allowed(team, "team-alpha", "team-alpha")
				allowed(teams, "team-alpha", "team-alpha")
				allowed(teams, "team-gamma", "team-gamma")
			case target.scope != "":
				denied(team, "", string(target.scope))
				denied(teams, "", string(target.scope))
			default:
				allowed(team, "", "")
			}
		}
		log := s.Log.String()
		for _, secret := range secrets {
			if strings.Contains(log, secret) || strings.Contains(log, strings.TrimPrefix(secret, "msb_")) {
				t.Error("the log contains a key")
			}
		}
		for _, cause := range []string{"signing key", "expired", "revoked"} {
			if !strings.Contains(log, cause) {
				t.Errorf("the log does not give %q as the reason of a refused key", cause)
			}
		}
	})
}

// Each call of a batch is authorized as if it were sent alone.
func TestBatchesAreAuthorizedMemberByMember(t *testing.T) {
	domain := &recorder{}
	s := New(t, func(o *Setup) { o.Sandboxes = domain })
	key := s.Issue(t, keys.IssueRequest{Namespaces: []string{"team-alpha"}, Scopes: []keys.Scope{keys.ScopeStop}})
	w := s.Post("["+strings.Join([]string{
		Request("sandbox.stop", `{"sandbox":"a","namespace":"default"}`),
		Request("sandbox.start", `{"sandbox":"a"}`),
		Request("sandbox.stop", `{"sandbox":"a"}`),
		`{"jsonrpc":"2.0","method":"sandbox.stop","params":{"sandbox":"a","namespace":"team-beta"}}`,
	}, ",")+"]", WithKey(key))
	if w.Code != http.StatusOK || strings.Count(w.Body.String(), "-32004") != 2 || strings.Count(w.Body.String(), `"result"`) != 1 {
		t.Errorf("got %d %s, want 200 with 2 refusals and 1 result", w.Code, w.Body)
	}
	if got := domain.takeCalls(); len(got) != 1 || got[0] != "stop in team-alpha" {
		t.Errorf("calls that reached the domain: %v, want only \"stop in team-alpha\"", got)
	}
}

// Every scope is needed by some method or path, and every path needs a key, except those that say that a server is here.
func TestEveryScopeIsUsed(t *testing.T) {
	s := New(t)
	used := map[keys.Scope]bool{}
	for _, m := range s.Service.Table() {
		used[m.Scope] = true
	}
	for _, e := range s.Endpoints {
		switch {
		case e.Scope == gateway.Open && !slices.Contains([]string{"GET /{$}", "GET /api/v1/health", "GET /healthz"}, e.Pattern):
			t.Errorf("%s needs no key", e.Pattern)
		case e.Scope != gateway.Open && e.Scope != gateway.PerCall:
			used[e.Scope] = true
		}
	}
	for _, scope := range keys.Scopes {
		if !used[scope] {
			t.Errorf("no method or path needs scope %s", scope)
		}
		delete(used, scope)
	}
	if len(used) != 0 {
		t.Errorf("methods or paths need scopes that no key can have: %v", used)
	}
}

func TestMethodWithoutScope(t *testing.T) {
	if err := serverpc.IndexWithoutScope(); err == nil || !strings.Contains(err.Error(), "scope") {
		t.Fatalf("a method without a scope was accepted: %v", err)
	}
}

func TestNamespaces(t *testing.T) {
	s := New(t)
	limited := func(namespaces ...string) string { return s.Issue(t, keys.IssueRequest{Namespaces: namespaces}) }
	team, teams, homeTeam := limited("team-alpha"), limited("team-alpha", "team-beta"), limited("team-alpha", "default")
	for _, namespace := range []string{"default", "team-alpha", "team-beta", "team-gamma"} {
		WantOK(t, s.Post(Request("sandbox.start", fmt.Sprintf(`{"sandbox":"a","namespace":%q}`, namespace))))
	}
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"b"}`), WithKey(team)))
	for name, c := range map[string]struct{ key, params, want string }{
		"all, global key":                                   {s.Key, `{"namespace":"*"}`, "default/a team-alpha/a team-alpha/b team-beta/a team-gamma/a"},
		"all, key for one namespace":                        {team, `{"namespace":"*"}`, "team-alpha/a team-alpha/b"},
		"all, key for two namespaces":                       {teams, `{"namespace":"*"}`, "team-alpha/a team-alpha/b team-beta/a"},
		"all by name, key for two namespaces":               {teams, `{"namespace":"*","sandbox":"b"}`, "team-alpha/b"},
		"all by name, name in both of the key's namespaces": {teams, `{"namespace":"*","sandbox":"a"}`, "team-alpha/a team-beta/a"},
		"absent, global key":                                {s.Key, `{}`, "default/a"},
		"absent, key for one namespace":                     {team, `{}`, "team-alpha/a team-alpha/b"},
		"absent, key that includes the default":             {homeTeam, `{}`, "default/a"},
		"named, global key":                                 {s.Key, `{"namespace":"team-alpha","sandbox":"b"}`, "team-alpha/b"},
		"named, key for two namespaces":                     {teams, `{"namespace":"team-beta"}`, "team-beta/a"},
		"by position, key for one namespace":                {team, `["b","team-alpha"]`, "team-alpha/b"},
	} {
		methods := []string{rpc.MethodSandboxMetricsGet}
		if strings.HasPrefix(c.params, "{") && !strings.Contains(c.params, `"sandbox"`) {
			methods = append(methods, rpc.MethodSandboxList)
		}
		for _, method := range methods {
			w := s.Post(Request(method, c.params), WithKey(c.key))
			WantOK(t, w)
			var res struct {
				Result struct {
					Sandboxes []struct{ Namespace, Name string }
				}
			}
			if err := json.Unmarshal(w.Body.Bytes(), &res, json.MatchCaseInsensitiveNames(true)); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, m := range res.Result.Sandboxes {
				got = append(got, m.Namespace+"/"+m.Name)
			}
			if strings.Join(got, " ") != c.want {
				t.Errorf("%s of %s: got sandboxes %q, want %q", method, name, got, c.want)
			}
		}
	}
	// The position in a list does not show what the key may not see.
	w := s.Post(Request("sandbox.list", `{"namespace":"*","after":"default/"}`), WithKey(team))
	if WantOK(t, w); strings.Contains(w.Body.String(), `"default"`) || !strings.Contains(w.Body.String(), `"team-alpha"`) {
		t.Errorf("a list after default/ is %s", w.Body)
	}
	// For a limited key, a sandbox outside its namespaces does not exist. Only the methods that list accept "*".
	WantError(t, s.Post(Request("sandbox.metrics.get", `{"namespace":"*","sandbox":"nope"}`), WithKey(teams)), http.StatusNotFound, rpc.CodeNotFound)
	WantError(t, s.Post(Request("sandbox.stop", `{"namespace":"*","sandbox":"a"}`), WithKey(teams)), http.StatusBadRequest, rpc.CodeInvalidParams)
	WantError(t, s.Post(Request("sandbox.get", `{"namespace":"*","sandbox":"a"}`), WithKey(teams)), http.StatusBadRequest, rpc.CodeInvalidParams)
	// In a namespace that the key may not use, the response does not depend on whether the sandbox exists.
	existing := s.Post(Request("sandbox.stop", `{"sandbox":"a","namespace":"default"}`), WithKey(team)).Body.String()
	absent := s.Post(Request("sandbox.stop", `{"sandbox":"nope","namespace":"default"}`), WithKey(team)).Body.String()
	if existing != absent {
		t.Errorf("the response reveals whether a sandbox exists: %s, but %s", existing, absent)
	}
	e := WantError(t, s.Post(Request("sandbox.start", `["x","other"]`), WithKey(team)), http.StatusForbidden, rpc.CodePermissionDenied)
	if !strings.Contains(e.Message, "other") {
		t.Error("the namespace given by position was not checked:", e.Message)
	}
	e = WantError(t, s.Post(Request("sandbox.start", `["x","other"]`), WithKey(teams)), http.StatusForbidden, rpc.CodePermissionDenied)
	if want := `limited to the namespaces "team-alpha", "team-beta";`; !strings.Contains(e.Message, want) {
		t.Errorf("message is %q, want %s", e.Message, want)
	}
}
