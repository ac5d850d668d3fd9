package gateway

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/token"
)

// untouchable panics when a call reaches it.
type untouchable struct{ Sandboxes }

// paramsFor fills every required param of a method.
func paramsFor(t *testing.T, m method, namespace string) string {
	t.Helper()
	params := map[string]string{"namespace": namespace}
	for _, p := range m.params {
		if p.required {
			params[p.name] = "x"
		}
	}
	b, err := json.Marshal(params, json.Deterministic(true))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestAuthorisation walks every method of the table with every kind of caller. A method that is
// added to the table is in it.
func TestAuthorisation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		weak := &scoped{scopes: []string{}}
		s := newSite(t, func(o *Options) {
			o.Sandboxes = untouchable{}
			weak.Verifier, o.Verifier = o.Verifier, weak
		})
		revoked := s.key
		if _, err := s.keys.Reset(t.Context()); err != nil {
			t.Fatal(err)
		}
		team := s.issue(t, token.IssueRequest{Namespace: "team-alpha"})
		expired := s.issue(t, token.IssueRequest{Expire: "1s"})
		weak.key = s.issue(t, token.IssueRequest{})
		everything := s.issue(t, token.IssueRequest{})
		unknown := newSite(t).key
		time.Sleep(2 * time.Second)

		if len(s.methods) < 5 {
			t.Fatalf("the table has %d methods", len(s.methods))
		}
		var refusal *httptest.ResponseRecorder
		for _, m := range s.methods {
			body := request(m.name, paramsFor(t, m, "team-beta"))
			for name, key := range map[string]string{
				"none": "", "malformed": "msb_nonsense", "scheme alone": "Bearer", "other scheme": "Basic " + everything,
				"expired": "Bearer " + expired, "revoked": revoked, "unknown": unknown, "altered": everything[:len(everything)-1] + "!",
				"two": everything + " " + everything,
			} {
				w := s.post(body, withKey(key))
				wantError(t, w, http.StatusUnauthorized, rpc.CodeUnauthenticated)
				w.Header().Del("X-Request-Id")
				if refusal == nil {
					refusal = w
				}
				if w.Body.String() != refusal.Body.String() || fmt.Sprint(w.Header()) != fmt.Sprint(refusal.Header()) {
					t.Errorf("%s with %s key: %v %s differs from %v %s", m.name, name, w.Header(), w.Body, refusal.Header(), refusal.Body)
				}
				if w.Header().Get("WWW-Authenticate") != "Bearer" {
					t.Errorf("%s with %s key: no challenge", m.name, name)
				}
			}
			e := wantError(t, s.post(body, withKey(team)), http.StatusForbidden, rpc.CodePermissionDenied)
			if !strings.Contains(e.Message, `"team-alpha"`) || !strings.Contains(e.Message, `"team-beta"`) {
				t.Errorf("%s in a foreign namespace: %q does not name both", m.name, e.Message)
			}
			e = wantError(t, s.post(body, withKey(weak.key)), http.StatusForbidden, rpc.CodePermissionDenied)
			if !strings.Contains(e.Message, string(m.scope)) {
				t.Errorf("%s without its scope: %q does not name it", m.name, e.Message)
			}
			// In a batch no member has more rights than alone.
			w := s.post("["+body+"]", withKey(team))
			if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), "-32004") {
				t.Errorf("%s in a batch: %d %s", m.name, w.Code, w.Body)
			}
		}
		for _, secret := range []string{revoked, team, expired, weak.key, everything, unknown} {
			if strings.Contains(s.log.String(), secret) {
				t.Error("a key is in the log")
			}
		}
		if !strings.Contains(s.log.String(), "signing key") || !strings.Contains(s.log.String(), "expired") {
			t.Error("the log does not tell why keys were refused:\n", s.log)
		}
	})
}

func TestMethodWithoutScope(t *testing.T) {
	m := define("sandbox.open", "", (&Gateway{}).stop)
	if _, err := index([]method{m}); err == nil || !strings.Contains(err.Error(), "scope") {
		t.Fatalf("a method without a scope was accepted: %v", err)
	}
}

func TestNamespaces(t *testing.T) {
	s := newSite(t)
	team := s.issue(t, token.IssueRequest{Namespace: "team-alpha"})
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"a"}`)))
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"b"}`), withKey(team)))
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"c","namespace":"team-alpha"}`), withKey(team)))
	for name, c := range map[string]struct{ key, params, want string }{
		"all, global key":      {s.key, `{"namespace":"*"}`, "default/a team-alpha/b team-alpha/c"},
		"all, limited key":     {team, `{"namespace":"*"}`, "team-alpha/b team-alpha/c"},
		"absent, global key":   {s.key, `{}`, "default/a"},
		"absent, limited key":  {team, `{}`, "team-alpha/b team-alpha/c"},
		"named, global key":    {s.key, `{"namespace":"team-alpha","sandbox":"c"}`, "team-alpha/c"},
		"by position, limited": {team, `["c","team-alpha"]`, "team-alpha/c"},
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
		fresh := s.issue(t, token.IssueRequest{})
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
		wantError(t, s.post(body, withKey(fresh)), http.StatusTooManyRequests, rpc.CodeExhausted)
		// Others behind the same address, other addresses, and requests without a key are not held up.
		wantOK(t, s.post(body))
		wantOK(t, s.post(body, withKey(fresh), func(r *http.Request) { r.RemoteAddr = "192.0.2.77:1" }))
		wantError(t, s.post(body, withKey("")), http.StatusUnauthorized, rpc.CodeUnauthenticated)
		time.Sleep(time.Second)
		wantOK(t, s.post(body, withKey(fresh)))
	})
}

func TestSource(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.1:80": "192.0.2.1/32", "[::ffff:192.0.2.1]:80": "192.0.2.1/32",
		"[2001:db8:1:2:3::4]:80": "2001:db8:1:2::/64", "[fe80::1%eth0]:80": "fe80::/64", "@": "invalid Prefix",
	} {
		if got := source(addr).String(); got != want {
			t.Errorf("source(%q) = %s, want %s", addr, got, want)
		}
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

func TestDevMode(t *testing.T) {
	s := newSite(t, func(o *Options) { o.Dev = true })
	body := request("sandbox.metrics.get", "{}")
	local := withHeader("X-Local", "1") // changes nothing
	to := func(host string) func(*http.Request) { return func(r *http.Request) { r.Host = host } }
	for _, host := range []string{"localhost:5555", "127.0.0.1:5555", "127.0.0.1", "[::1]:5555", "[::1]", "LOCALHOST"} {
		wantOK(t, s.post(body, to(host), withKey("")))
		wantOK(t, s.post(body, to(host), withKey("anything")))
		wantOK(t, s.post(body, to(host), withHeader("Origin", "http://"+host)))
	}
	for name, change := range map[string]func(*http.Request){
		"rebound name":    to("evil.example:5555"),
		"private address": to("192.168.1.1:5555"),
		"no host":         to(""),
		"foreign origin":  withHeader("Origin", "https://evil.example"),
		"other port":      withHeader("Origin", "http://localhost:3000"),
		"opaque origin":   withHeader("Origin", "null"),
		"cross-site":      withHeader("Sec-Fetch-Site", "cross-site"),
		"same-site":       withHeader("Sec-Fetch-Site", "same-site"),
		"lying browser": func(r *http.Request) {
			r.Header.Set("Sec-Fetch-Site", "same-origin")
			r.Header.Set("Origin", "http://evil")
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := s.post(body, to("localhost:5555"), local, change)
			wantError(t, w, http.StatusForbidden, rpc.CodePermissionDenied)
			for h := range w.Header() {
				if strings.HasPrefix(h, "Access-Control-") {
					t.Error("a CORS header:", h)
				}
			}
		})
	}
	wantError(t, s.post(body, to("localhost"), withHeader("Content-Type", "text/plain")), http.StatusUnsupportedMediaType, rpc.CodeInvalidRequest)
	wantOK(t, s.post(request("sandbox.start", `{"sandbox":"a","namespace":"any"}`), to("localhost"), withKey("")))
}
