package http

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
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
func (d *door) RunCode(_ context.Context, n sandbox.Name, _ sandbox.CodeRun) (sandbox.CodeResult, error) {
	return sandbox.CodeResult{}, d.call("code", n.Namespace)
}
func (d *door) RunCommand(_ context.Context, n sandbox.Name, _ sandbox.CommandRun) (sandbox.CommandResult, error) {
	return sandbox.CommandResult{}, d.call("command", n.Namespace)
}
func (d *door) Metrics(_ context.Context, namespace, _ string) ([]sandbox.Metrics, error) {
	return nil, d.call("metrics", namespace)
}

// paramsFor fills every required param of a method, and names a namespace unless it is empty.
func paramsFor(t *testing.T, m method, namespace string) string {
	t.Helper()
	params := map[string]string{}
	if namespace != "" {
		params["namespace"] = namespace
	}
	for _, p := range m.params {
		if p.required {
			params[p.name] = "python" // a name, a language and code
		}
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
func (s *site) targets(t *testing.T) (all []target) {
	t.Helper()
	for path, at := range s.routes {
		if at.open {
			continue
		}
		for _, httpMethod := range at.methods {
			send := func(body, key string) *httptest.ResponseRecorder {
				return s.post(body, withKey(key), func(r *http.Request) { r.Method, r.URL.Path = httpMethod, path })
			}
			if httpMethod != http.MethodPost {
				all = append(all, target{
					name: httpMethod + " " + path, scope: at.scope,
					send: func(key, _ string) *httptest.ResponseRecorder { return send("", key) },
				})
				continue
			}
			all = append(all, target{
				name: path + " " + rpc.MethodDiscover,
				send: func(key, _ string) *httptest.ResponseRecorder { return send(request(rpc.MethodDiscover, "{}"), key) },
			})
			for _, m := range s.methods {
				all = append(all, target{
					name: path + " " + m.name, scope: m.scope, inNamespace: true,
					send: func(key, namespace string) *httptest.ResponseRecorder {
						return send(request(m.name, paramsFor(t, m, namespace)), key)
					},
				})
			}
		}
	}
	return all
}

// TestAuthorisation asks for everything with every kind of key: the whole matrix. What is added to the
// tables is in it.
func TestAuthorisation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		domain := &door{}
		s := newSite(t, func(o *Options) { o.Sandboxes = domain })
		targets := s.targets(t)
		if len(targets) < 26 { // 4 paths of 5 methods and rpc.discover, and two of /metrics
			t.Fatalf("there are only %d targets", len(targets))
		}
		// used is a key that was accepted before: what made its next request cheap must not keep it alive.
		used := func(key string) string {
			wantOK(t, s.post(request("rpc.discover", "{}"), withKey(key)))
			return key
		}
		signed := used(s.key)
		if _, err := s.keys.Reset(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		issue := func(req keys.IssueRequest) (key, id string) {
			key, id = s.issueNamed(t, req)
			return used(key), id
		}
		good, _ := issue(keys.IssueRequest{})
		expired, _ := issue(keys.IssueRequest{Expire: "1s"})
		revoked, id := issue(keys.IssueRequest{})
		if _, err := s.keys.Revoke(t.Context(), id, 0); err != nil {
			t.Fatal(err)
		}
		pruned, id := issue(keys.IssueRequest{})
		if _, err := s.keys.Revoke(t.Context(), id, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := s.keys.Prune(t.Context(), "", false, 0); err != nil {
			t.Fatal(err)
		}
		rotated, id := issue(keys.IssueRequest{})
		if _, _, _, err := s.keys.Rotate(t.Context(), keys.RotateRequest{Ref: id}); err != nil {
			t.Fatal(err)
		}
		graced, id := issue(keys.IssueRequest{})
		if _, _, _, err := s.keys.Rotate(t.Context(), keys.RotateRequest{Ref: id, Grace: "1h"}); err != nil {
			t.Fatal(err)
		}
		used(graced)
		time.Sleep(2 * time.Hour)

		dead := map[string]string{
			"none": "", "scheme alone": "Bearer", "no token": "Bearer ", "other scheme": "Basic " + good, "two": good + " " + good,
			"malformed": "msb_nonsense", "prefix": "Bearer msb_", "altered": good[:len(good)-1] + "!", "cut": good[:len(good)-1],
			"longer": good + "A", "unknown": newSite(t).key,
			"expired": "Bearer " + expired, "revoked": revoked, "pruned": pruned, "reset": signed,
			"rotated": rotated, "rotated, after its grace": "Bearer " + graced,
		}
		var refusal *httptest.ResponseRecorder
		for _, target := range targets {
			for name, key := range dead {
				w := target.send(key, "team-beta")
				wantError(t, w, http.StatusUnauthorized, rpc.CodeUnauthenticated)
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
				s.tries = newTries() // its bound has a test of its own
			}
		}
		if got := domain.passed(); got != nil {
			t.Fatal("without a good key there got through:", got)
		}

		team := s.issue(t, keys.IssueRequest{Namespaces: []string{"team-alpha"}})
		teams := s.issue(t, keys.IssueRequest{Namespaces: []string{"team-alpha", "team-gamma"}})
		secrets := []string{signed, good, expired, revoked, pruned, rotated, graced, team, teams}
		for _, target := range targets {
			denied := func(key, namespace string, told ...string) {
				t.Helper()
				e := wantError(t, target.send(key, namespace), http.StatusForbidden, rpc.CodePermissionDenied)
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
				weakKey, strongKey := s.issue(t, weak), s.issue(t, strong)
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
		log := s.log.String()
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
	s := newSite(t, func(o *Options) { o.Sandboxes = domain })
	key := s.issue(t, keys.IssueRequest{Namespaces: []string{"team-alpha"}, Scopes: []keys.Scope{keys.ScopeStop}})
	w := s.post("["+strings.Join([]string{
		request("sandbox.stop", `{"sandbox":"a","namespace":"default"}`),
		request("sandbox.start", `{"sandbox":"a"}`),
		request("sandbox.stop", `{"sandbox":"a"}`),
		`{"jsonrpc":"2.0","method":"sandbox.stop","params":{"sandbox":"a","namespace":"team-beta"}}`,
	}, ",")+"]", withKey(key))
	if w.Code != http.StatusOK || strings.Count(w.Body.String(), "-32004") != 2 || strings.Count(w.Body.String(), `"result"`) != 1 {
		t.Errorf("answer is %d %s", w.Code, w.Body)
	}
	if got := domain.passed(); len(got) != 1 || got[0] != "stop in team-alpha" {
		t.Errorf("there got through: %v", got)
	}
}

// Every scope opens something, and nothing is open without one.
func TestEveryScopeIsUsed(t *testing.T) {
	s := newSite(t)
	used := map[keys.Scope]bool{}
	for _, m := range s.methods {
		used[m.scope] = true
	}
	for path, at := range s.routes {
		if at.open && (path != rpc.HealthPath || at.scope != "") {
			t.Errorf("%s needs no key", path)
		}
		if at.scope != "" {
			used[at.scope] = true
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
	m := define("sandbox.open", "", (&Gateway{}).stop)
	if _, err := index([]method{m}); err == nil || !strings.Contains(err.Error(), "scope") {
		t.Fatalf("a method without a scope was accepted: %v", err)
	}
}

func TestNamespaces(t *testing.T) {
	s := newSite(t)
	limited := func(namespaces ...string) string { return s.issue(t, keys.IssueRequest{Namespaces: namespaces}) }
	team, teams, home := limited("team-alpha"), limited("team-alpha", "team-beta"), limited("team-alpha", "default")
	for _, namespace := range []string{"default", "team-alpha", "team-beta", "team-gamma"} {
		wantOK(t, s.post(request("sandbox.start", fmt.Sprintf(`{"sandbox":"a","namespace":%q}`, namespace))))
	}
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"b"}`), withKey(team)))
	for name, c := range map[string]struct{ key, params, want string }{
		"all, global key":            {s.key, `{"namespace":"*"}`, "default/a team-alpha/a team-alpha/b team-beta/a team-gamma/a"},
		"all, limited key":           {team, `{"namespace":"*"}`, "team-alpha/a team-alpha/b"},
		"all, key of two":            {teams, `{"namespace":"*"}`, "team-alpha/a team-alpha/b team-beta/a"},
		"all, by name, key of two":   {teams, `{"namespace":"*","sandbox":"b"}`, "team-alpha/b"},
		"all, same name, key of two": {teams, `{"namespace":"*","sandbox":"a"}`, "team-alpha/a team-beta/a"},
		"absent, global key":         {s.key, `{}`, "default/a"},
		"absent, limited key":        {team, `{}`, "team-alpha/a team-alpha/b"},
		"absent, key of the default": {home, `{}`, "default/a"},
		"named, global key":          {s.key, `{"namespace":"team-alpha","sandbox":"b"}`, "team-alpha/b"},
		"named, key of two":          {teams, `{"namespace":"team-beta"}`, "team-beta/a"},
		"by position, limited key":   {team, `["b","team-alpha"]`, "team-alpha/b"},
	} {
		w := s.post(request("sandbox.metrics.get", c.params), withKey(c.key))
		wantOK(t, w)
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
	wantError(t, s.post(request("sandbox.metrics.get", `{"namespace":"*","sandbox":"nope"}`), withKey(teams)), http.StatusNotFound, rpc.CodeNotFound)
	wantError(t, s.post(request("sandbox.stop", `{"namespace":"*","sandbox":"a"}`), withKey(teams)), http.StatusBadRequest, rpc.CodeInvalidParams)
	// A foreign name is refused alike whether or not its sandbox exists.
	there := s.post(request("sandbox.stop", `{"sandbox":"a","namespace":"default"}`), withKey(team)).Body.String()
	absent := s.post(request("sandbox.stop", `{"sandbox":"nope","namespace":"default"}`), withKey(team)).Body.String()
	if there != absent {
		t.Errorf("a foreign sandbox shows: %s, but %s", there, absent)
	}
	e := wantError(t, s.post(request("sandbox.start", `["x","other"]`), withKey(team)), http.StatusForbidden, rpc.CodePermissionDenied)
	if !strings.Contains(e.Message, "other") {
		t.Error("a positional namespace was not checked:", e.Message)
	}
}

func TestHeaderForms(t *testing.T) {
	s := newSite(t)
	body := request("sandbox.metrics.get", "{}")
	for _, form := range []string{"Bearer %s", "bearer %s", "BEARER  %s", "%s"} {
		value := fmt.Sprintf(form, s.key)
		wantOK(t, s.post(body, withKey(value)))
		wantOK(t, s.post(body, withHeader("Proxy-Authorization", value), withKey("Bearer wrong")))
		wantOK(t, s.post(body, withHeader("Proxy-Authorization", value), func(r *http.Request) { r.Header.Del("Authorization") }))
	}
	for _, bad := range []func(*http.Request){
		withHeader("Proxy-Authorization", "Bearer wrong"),
		withHeader("Proxy-Authorization", ""),
		func(r *http.Request) { r.Header.Add("Authorization", "Bearer "+s.key) },
		withKey("Bearer, " + s.key),
		withKey("Bearer\t" + s.key),
		withKey("Token " + s.key),
	} {
		wantError(t, s.post(body, bad), http.StatusUnauthorized, rpc.CodeUnauthenticated)
	}
}

func TestBadKeyFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		fresh := s.issue(t, keys.IssueRequest{})
		body := request("sandbox.metrics.get", "{}")
		wantOK(t, s.post(body))
		for i := range triesBurst {
			wantError(t, s.post(body, withKey(fmt.Sprint("msb_wrong", i))), http.StatusUnauthorized, rpc.CodeUnauthenticated)
		}
		w := s.post(body, withKey("msb_wrong"))
		wantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
		if w.Header().Get("Retry-After") == "" {
			t.Error("no Retry-After")
		}
		if strings.Contains(s.log.String(), errTooManyTries.Error()) {
			t.Error("a flood fills the log")
		}
		wantError(t, s.post(body, withKey(fresh)), http.StatusTooManyRequests, rpc.CodeExhausted)
		// Others behind the same address, other addresses, and requests without a key are not held up.
		wantOK(t, s.post(body))
		wantOK(t, s.post(body, withKey(fresh), func(r *http.Request) { r.RemoteAddr = "192.0.2.77:1" }))
		wantError(t, s.post(body, withKey("")), http.StatusUnauthorized, rpc.CodeUnauthenticated)
		time.Sleep(time.Second)
		wantOK(t, s.post(body, withKey(fresh)))
	})
}

// A key that was accepted is checked also when its source is over the bound of bad ones. Once it has
// ended, it is one of those.
func TestEndedKeyIsABadKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		ended, id := s.issueNamed(t, keys.IssueRequest{})
		body := request("sandbox.metrics.get", "{}")
		wantOK(t, s.post(body, withKey(ended)))
		if _, err := s.keys.Revoke(t.Context(), id, 0); err != nil {
			t.Fatal(err)
		}
		for range triesBurst {
			wantError(t, s.post(body, withKey(ended)), http.StatusUnauthorized, rpc.CodeUnauthenticated)
		}
		wantError(t, s.post(body, withKey(ended)), http.StatusTooManyRequests, rpc.CodeExhausted)
	})
}

func TestTriesForget(t *testing.T) {
	tries := newTries()
	for i := range 2 * maxAccepted {
		tries.succeeded(fmt.Sprint("key", i))
	}
	for i := range 2 * maxSources {
		tries.failed(source(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})), "key")
	}
	if len(tries.accepted) > maxAccepted || len(tries.sources.entries) > maxSources {
		t.Errorf("%d keys and %d sources are remembered", len(tries.accepted), len(tries.sources.entries))
	}
}

func TestLRU(t *testing.T) {
	l := newLRU[int, int](2)
	l.put(1, 1)
	l.put(2, 2)
	l.get(1)
	l.put(3, 3)
	l.put(3, 4)
	_, one := l.get(1)
	_, two := l.get(2)
	three, _ := l.get(3)
	if !one || two || three != 4 || l.order.Len() != 2 {
		t.Errorf("after 1, 2, 1, 3: holds 1 %v, 2 %v, 3 as %d", one, two, three)
	}
}

// What a browser sends, as it is seen on the wire, for each way in which a page can make it send something.
func TestDevModeRefusesWebPages(t *testing.T) {
	s := newSite(t, func(o *Options) { o.Dev = true })
	body := request("sandbox.metrics.get", "{}")
	to := func(host string) func(*http.Request) { return func(r *http.Request) { r.Host = host } }
	headers := func(pairs ...string) func(*http.Request) {
		return func(r *http.Request) {
			for i := 0; i < len(pairs); i += 2 {
				r.Header.Add(pairs[i], pairs[i+1])
			}
		}
	}
	const evil = "https://evil.example"
	attacks := map[string][]func(*http.Request){
		"fetch with CORS":           {headers("Origin", evil, "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "cors")},
		"fetch without CORS":        {headers("Origin", evil, "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors"), withHeader("Content-Type", "text/plain")},
		"form":                      {headers("Origin", evil, "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate"), withHeader("Content-Type", "text/plain")},
		"form of an old browser":    {headers("Origin", evil), withHeader("Content-Type", "application/x-www-form-urlencoded")},
		"form of a sandboxed frame": {headers("Origin", "null", "Sec-Fetch-Site", "cross-site")},
		"preflight":                 {at(http.MethodOptions, rpc.Path), headers("Origin", evil, "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "content-type", "Sec-Fetch-Site", "cross-site")},
		"WebSocket":                 {at(http.MethodGet, rpc.Path), headers("Origin", evil, "Upgrade", "websocket", "Connection", "Upgrade", "Sec-WebSocket-Key", "x", "Sec-WebSocket-Version", "13")},
		"navigation":                {at(http.MethodGet, rpc.HealthPath), headers("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate")},
		"image":                     {at(http.MethodGet, rpc.HealthPath), headers("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "image")},
		"script of /metrics":        {at(http.MethodGet, rpc.MetricsPath), headers("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "script")},
		"fetch of /metrics":         {at(http.MethodGet, rpc.MetricsPath), headers("Origin", evil, "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "cors")},
		"page of another port":      {headers("Origin", "http://localhost:3000", "Sec-Fetch-Site", "same-site")},
		"image on another port":     {at(http.MethodGet, rpc.MetricsPath), headers("Sec-Fetch-Site", "same-site")},
		"two answers":               {at(http.MethodGet, rpc.MetricsPath), headers("Sec-Fetch-Site", "none", "Sec-Fetch-Site", "cross-site")},
		"unheard-of site":           {at(http.MethodGet, rpc.MetricsPath), headers("Sec-Fetch-Site", "")},
		"two origins":               {headers("Origin", "http://localhost:5555", "Origin", evil)},
		"lying browser":             {headers("Origin", "http://evil", "Sec-Fetch-Site", "same-origin")},
	}
	// A name of the attacker's that points here: the browser takes the page for this server's own.
	rebound := map[string]string{
		"rebound name": "evil.example:5555", "private address": "192.168.1.1:5555", "every address": "0.0.0.0:5555", "no host": "",
		"name below localhost": "evil.localhost:5555", "localhost as a label": "localhost.evil.example", "trailing dot": "localhost.:5555", "two hosts": "localhost:5555,evil.example",
	}
	for name, host := range rebound {
		own := headers("Origin", "http://"+host, "Sec-Fetch-Site", "same-origin")
		attacks[name] = []func(*http.Request){to(host), own}
		attacks[name+", health"] = []func(*http.Request){to(host), own, at(http.MethodGet, rpc.HealthPath)}
		attacks[name+", metrics"] = []func(*http.Request){to(host), own, at(http.MethodGet, rpc.MetricsPath)}
		attacks[name+", elsewhere"] = []func(*http.Request){to(host), own, at(http.MethodGet, "/")}
	}
	for name, changes := range attacks {
		t.Run(name, func(t *testing.T) {
			w := s.post(body, append([]func(*http.Request){to("localhost:5555")}, changes...)...)
			wantError(t, w, http.StatusForbidden, rpc.CodePermissionDenied)
			for h := range w.Header() {
				if strings.HasPrefix(h, "Access-Control-") {
					t.Error("a CORS header:", h)
				}
			}
			if w.Header().Get("X-Content-Type-Options") != "nosniff" {
				t.Error("the answer may be sniffed")
			}
		})
	}
	// A page can send these without asking first, if nothing else stops it.
	for _, kind := range []string{"text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""} {
		wantError(t, s.post(body, to("localhost"), withHeader("Content-Type", kind)), http.StatusUnsupportedMediaType, rpc.CodeInvalidRequest)
	}
}

// Programs and the address bar of a browser are let in, with any key or none.
func TestDevMode(t *testing.T) {
	s := newSite(t, func(o *Options) { o.Dev = true })
	body := request("sandbox.metrics.get", "{}")
	to := func(host string) func(*http.Request) { return func(r *http.Request) { r.Host = host } }
	for _, host := range []string{"localhost:5555", "127.0.0.1:5555", "127.0.0.1", "[::1]:5555", "[::1]", "LOCALHOST"} {
		wantOK(t, s.post(body, to(host), withKey("")))
		wantOK(t, s.post(body, to(host), withKey("anything")))
		wantOK(t, s.post(body, to(host), withHeader("Origin", "http://"+host)))
		for _, path := range []string{rpc.HealthPath, rpc.MetricsPath} {
			if w := s.post("", to(host), withKey(""), at(http.MethodGet, path), withHeader("Sec-Fetch-Site", "none")); w.Code != http.StatusOK {
				t.Errorf("%s at %s: %d %s", path, host, w.Code, w.Body)
			}
		}
	}
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"a","namespace":"any"}`), to("localhost"), withKey("")))
}
