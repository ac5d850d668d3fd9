package rpc_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
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

// door counts the calls that get through to the domain.
type door struct {
	mu    sync.Mutex
	calls []string
}

func (d *door) call(what, namespace string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, what+" in "+namespace)
	return nil
}

// passed returns what got through since it was last asked.
func (d *door) passed() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	calls := d.calls
	d.calls = nil
	return calls
}

func (d *door) Start(_ context.Context, n sandbox.Name, _ sandbox.Request) error {
	return d.call("start", n.Namespace)
}
func (d *door) Stop(_ context.Context, n sandbox.Name) error { return d.call("stop", n.Namespace) }
func (d *door) RunCode(ctx context.Context, n sandbox.Name, _ sandbox.Code) (sandbox.Process, error) {
	return nothing(ctx), d.call("code", n.Namespace)
}
func (d *door) RunCommand(ctx context.Context, n sandbox.Name, _ sandbox.Command) (sandbox.Process, error) {
	return nothing(ctx), d.call("command", n.Namespace)
}

// nothing is a process that prints nothing.
func nothing(ctx context.Context) sandbox.Process {
	return &sandboxtest.Process{Context: ctx, Body: func(context.Context) ([]sandbox.Event, int, error) { return nil, 0, nil }}
}
func (d *door) Metrics(_ context.Context, namespace, _ string) ([]sandbox.Metrics, error) {
	return nil, d.call("metrics", namespace)
}

// paramsFor fills every required param of a method, and names a namespace unless it is empty.
func paramsFor(t *testing.T, m serverpc.Method, namespace string) string {
	t.Helper()
	params := map[string]string{}
	if namespace != "" {
		params["namespace"] = namespace
	}
	for _, name := range m.Required {
		params[name] = "python" // a name, a language and code
	}
	b, err := json.Marshal(params, json.Deterministic(true))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// target is one thing that can be asked of the gateway.
type target struct {
	name  string
	scope keys.Scope // that it needs; empty: any key will do
	// send asks for it in a namespace (empty: none is named).
	send func(key, namespace string) *httptest.ResponseRecorder
	// inNamespace says that it happens in one; the others concern the whole server, or nothing.
	inNamespace bool
}

// targets is everything that needs a key, as the tables of routes and methods have it: each method of
// each path, alone and in a batch.
func targets(t *testing.T, s *Site) (all []target) {
	t.Helper()
	for _, e := range s.Endpoints {
		if e.Scope == gateway.Open {
			continue
		}
		httpMethod, path, _ := strings.Cut(e.Pattern, " ")
		send := func(body, key string) *httptest.ResponseRecorder {
			return s.Post(body, WithKey(key), At(httpMethod, path))
		}
		if httpMethod == http.MethodGet { // and so HEAD
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
					return send(Request(m.Name, paramsFor(t, m, namespace)), key)
				},
			})
		}
	}
	return all
}

// TestAuthorisation asks for everything with every kind of key: the whole matrix. What is added to the
// tables is in it.
func TestAuthorisation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		domain := &door{}
		s := New(t, func(o *Setup) { o.Sandboxes = domain })
		targets := targets(t, s)
		if len(targets) < 26 { // 4 paths of 5 methods and rpc.discover, and two of /metrics
			t.Fatalf("there are only %d targets", len(targets))
		}
		// used is a key that was accepted before: what made its next request cheap must not keep it alive.
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

		dead := map[string]string{
			"none": "", "scheme alone": "Bearer", "no token": "Bearer ", "other scheme": "Basic " + good, "two": good + " " + good,
			"malformed": "msb_nonsense", "prefix": "Bearer msb_", "altered": good[:len(good)-1] + "!", "cut": good[:len(good)-1],
			"longer": good + "A", "unknown": New(t).Key,
			"expired": "Bearer " + expired, "revoked": revoked, "pruned": pruned, "reset": signed,
			"rotated": rotated, "rotated, after its grace": "Bearer " + graced,
		}
		var refusal *httptest.ResponseRecorder
		for _, target := range targets {
			for name, key := range dead {
				w := target.send(key, "team-beta")
				WantError(t, w, http.StatusUnauthorized, rpc.CodeUnauthenticated)
				w.Header().Del("X-Request-Id")
				if refusal == nil {
					refusal = w
				}
				if !bytes.Equal(w.Body.Bytes(), refusal.Body.Bytes()) || fmt.Sprint(w.Header()) != fmt.Sprint(refusal.Header()) {
					t.Errorf("%s with %s key: %v %s differs from %v %s", target.name, name, w.Header(), w.Body, refusal.Header(), refusal.Body)
				}
				if w.Header().Get("WWW-Authenticate") != "Bearer" {
					t.Errorf("%s with %s key: no challenge", target.name, name)
				}
				time.Sleep(time.Second) // the bound on bad keys has a test of its own
			}
		}
		if got := domain.passed(); got != nil {
			t.Fatal("without a good key there got through:", got)
		}

		team := s.Issue(t, keys.IssueRequest{Namespaces: []string{"team-alpha"}})
		teams := s.Issue(t, keys.IssueRequest{Namespaces: []string{"team-alpha", "team-gamma"}})
		secrets := []string{signed, good, expired, revoked, pruned, rotated, graced, team, teams}
		for _, target := range targets {
			denied := func(key, namespace string, told ...string) {
				t.Helper()
				e := WantError(t, target.send(key, namespace), http.StatusForbidden, rpc.CodePermissionDenied)
				for _, what := range told {
					if !strings.Contains(e.Message, what) {
						t.Errorf("%s: %q does not tell of %s", target.name, e.Message, what)
					}
				}
				if got := domain.passed(); got != nil {
					t.Errorf("%s: there got through: %v", target.name, got)
				}
			}
			passes := func(key, namespace, in string) {
				t.Helper()
				if w := target.send(key, namespace); w.Code != http.StatusOK {
					t.Errorf("%s in %q: %d %s", target.name, namespace, w.Code, w.Body)
				}
				got := domain.passed()
				if target.inNamespace && (len(got) != 1 || !strings.HasSuffix(got[0], " in "+in)) || !target.inNamespace && got != nil {
					t.Errorf("%s in %q: there got through: %v", target.name, namespace, got)
				}
			}
			passes(good, "team-beta", "team-beta")
			passes(good, "", "default")
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
				passes(strongKey, "team-alpha", "team-alpha")
			}
			switch {
			case target.inNamespace:
				denied(team, "team-beta", `"team-alpha"`, `"team-beta"`)
				denied(team, "default", `"team-alpha"`, `"default"`)
				denied(teams, "team-beta", `"team-alpha"`, `"team-gamma"`, `"team-beta"`)
				denied(teams, "", `"team-alpha"`, `"team-gamma"`, `"default"`)
				passes(team, "", "team-alpha")
				passes(team, "team-alpha", "team-alpha")
				passes(teams, "team-alpha", "team-alpha")
				passes(teams, "team-gamma", "team-gamma")
			case target.scope != "":
				denied(team, "", string(target.scope))
				denied(teams, "", string(target.scope))
			default:
				passes(team, "", "")
			}
		}
		log := s.Log.String()
		for _, secret := range secrets {
			if strings.Contains(log, secret) || strings.Contains(log, strings.TrimPrefix(secret, "msb_")) {
				t.Error("a key is in the log")
			}
		}
		for _, cause := range []string{"signing key", "expired", "revoked"} {
			if !strings.Contains(log, cause) {
				t.Errorf("the log does not tell that keys were refused because of %q", cause)
			}
		}
	})
}

// In a batch, no member has more rights than alone, and none has fewer for its neighbours.
func TestBatchesAreAuthorisedMemberByMember(t *testing.T) {
	domain := &door{}
	s := New(t, func(o *Setup) { o.Sandboxes = domain })
	key := s.Issue(t, keys.IssueRequest{Namespaces: []string{"team-alpha"}, Scopes: []keys.Scope{keys.ScopeStop}})
	w := s.Post("["+strings.Join([]string{
		Request("sandbox.stop", `{"sandbox":"a","namespace":"default"}`),
		Request("sandbox.start", `{"sandbox":"a"}`),
		Request("sandbox.stop", `{"sandbox":"a"}`),
		`{"jsonrpc":"2.0","method":"sandbox.stop","params":{"sandbox":"a","namespace":"team-beta"}}`,
	}, ",")+"]", WithKey(key))
	if w.Code != http.StatusOK || strings.Count(w.Body.String(), "-32004") != 2 || strings.Count(w.Body.String(), `"result"`) != 1 {
		t.Errorf("answer is %d %s", w.Code, w.Body)
	}
	if got := domain.passed(); len(got) != 1 || got[0] != "stop in team-alpha" {
		t.Errorf("there got through: %v", got)
	}
}

// Every scope opens something, and nothing is open without one.
func TestEveryScopeIsUsed(t *testing.T) {
	s := New(t)
	used := map[keys.Scope]bool{}
	for _, m := range s.Service.Table() {
		used[m.Scope] = true
	}
	for _, e := range s.Endpoints {
		switch {
		case e.Scope == gateway.Open && e.Pattern != "GET "+rpc.HealthPath:
			t.Errorf("%s needs no key", e.Pattern)
		case e.Scope != gateway.Open && e.Scope != gateway.PerCall:
			used[e.Scope] = true
		}
	}
	for _, scope := range keys.Scopes {
		if !used[scope] {
			t.Errorf("no method and no path needs %s", scope)
		}
		delete(used, scope)
	}
	if len(used) != 0 {
		t.Errorf("scopes that keys cannot have are needed: %v", used)
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
	team, teams, home := limited("team-alpha"), limited("team-alpha", "team-beta"), limited("team-alpha", "default")
	for _, namespace := range []string{"default", "team-alpha", "team-beta", "team-gamma"} {
		WantOK(t, s.Post(Request("sandbox.start", fmt.Sprintf(`{"sandbox":"a","namespace":%q}`, namespace))))
	}
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"b"}`), WithKey(team)))
	for name, c := range map[string]struct{ key, params, want string }{
		"all, global key":            {s.Key, `{"namespace":"*"}`, "default/a team-alpha/a team-alpha/b team-beta/a team-gamma/a"},
		"all, limited key":           {team, `{"namespace":"*"}`, "team-alpha/a team-alpha/b"},
		"all, key of two":            {teams, `{"namespace":"*"}`, "team-alpha/a team-alpha/b team-beta/a"},
		"all, by name, key of two":   {teams, `{"namespace":"*","sandbox":"b"}`, "team-alpha/b"},
		"all, same name, key of two": {teams, `{"namespace":"*","sandbox":"a"}`, "team-alpha/a team-beta/a"},
		"absent, global key":         {s.Key, `{}`, "default/a"},
		"absent, limited key":        {team, `{}`, "team-alpha/a team-alpha/b"},
		"absent, key of the default": {home, `{}`, "default/a"},
		"named, global key":          {s.Key, `{"namespace":"team-alpha","sandbox":"b"}`, "team-alpha/b"},
		"named, key of two":          {teams, `{"namespace":"team-beta"}`, "team-beta/a"},
		"by position, limited key":   {team, `["b","team-alpha"]`, "team-alpha/b"},
	} {
		w := s.Post(Request("sandbox.metrics.get", c.params), WithKey(c.key))
		WantOK(t, w)
		var res struct{ Result rpc.MetricsResult }
		if err := json.Unmarshal(w.Body.Bytes(), &res, json.MatchCaseInsensitiveNames(true)); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, m := range res.Result.Sandboxes {
			got = append(got, m.Namespace+"/"+m.Name)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: sees %q, want %q", name, got, c.want)
		}
	}
	// What the key of two may not see is not there for it, and only metrics may be asked for everywhere.
	WantError(t, s.Post(Request("sandbox.metrics.get", `{"namespace":"*","sandbox":"nope"}`), WithKey(teams)), http.StatusNotFound, rpc.CodeNotFound)
	WantError(t, s.Post(Request("sandbox.stop", `{"namespace":"*","sandbox":"a"}`), WithKey(teams)), http.StatusBadRequest, rpc.CodeInvalidParams)
	// A foreign name is refused alike whether or not its sandbox exists.
	there := s.Post(Request("sandbox.stop", `{"sandbox":"a","namespace":"default"}`), WithKey(team)).Body.String()
	absent := s.Post(Request("sandbox.stop", `{"sandbox":"nope","namespace":"default"}`), WithKey(team)).Body.String()
	if there != absent {
		t.Errorf("a foreign sandbox shows: %s, but %s", there, absent)
	}
	e := WantError(t, s.Post(Request("sandbox.start", `["x","other"]`), WithKey(team)), http.StatusForbidden, rpc.CodePermissionDenied)
	if !strings.Contains(e.Message, "other") {
		t.Error("a positional namespace was not checked:", e.Message)
	}
}
