package stream_test

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// TestAuthorization requests every endpoint with every kind of key.
func TestAuthorization(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := newSite(t)
		type target struct {
			pattern string
			scope   keys.Scope
			status  int // of a request that is allowed; a recorder cannot become a WebSocket
		}
		var targets []target
		for _, e := range s.Endpoints {
			switch {
			case !strings.Contains(e.Pattern, rpc.SandboxesPath):
			case e.WebSocket:
				targets = append(targets, target{e.Pattern, keys.ScopeExec, http.StatusBadRequest})
			default:
				targets = append(targets, target{e.Pattern, keys.ScopeFiles, http.StatusNotFound})
			}
		}
		if len(targets) != 5 {
			t.Fatalf("got %d endpoints, want 5", len(targets))
		}
		send := func(target target, key, namespace string) *httptest.ResponseRecorder {
			method, path, _ := strings.Cut(target.pattern, " ")
			path = strings.NewReplacer("{name}", "gone", "{port}", "80").Replace(path)
			return s.Post("", At(method, path), WithKey(key), func(r *http.Request) {
				if target.scope == keys.ScopeFiles {
					r.URL.RawQuery = "path=/a"
				}
				if namespace != "" {
					r.URL.RawQuery += "&namespace=" + namespace
				}
				r.Header.Set("Content-Length", "0")
				r.Header.Set("Connection", "Upgrade")
				r.Header.Set("Upgrade", "websocket")
				r.Header.Set("Sec-WebSocket-Version", "13")
				r.Header.Set("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==")
			})
		}
		expired := s.Issue(t, keys.IssueRequest{Expire: "1s"})
		revoked, id := s.IssueNamed(t, keys.IssueRequest{})
		if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		team := s.Issue(t, keys.IssueRequest{Namespaces: []string{"team"}})
		teams := s.Issue(t, keys.IssueRequest{Namespaces: []string{"team", "other"}})
		for _, target := range targets {
			for name, key := range map[string]string{"none": "", "malformed": "msb_x", "expired": expired, "revoked": revoked, "of another server": New(t).Key} {
				w := send(target, key, "")
				if w.Code != http.StatusUnauthorized {
					t.Errorf("%s with key %s: %d %s", target.pattern, name, w.Code, w.Body)
				}
				time.Sleep(time.Second) // stay below the limit on bad keys
			}
			others := slices.DeleteFunc(slices.Clone(keys.Scopes), func(scope keys.Scope) bool { return scope == target.scope })
			denied := func(key, namespace, mentions string) {
				t.Helper()
				e := WantError(t, send(target, key, namespace), http.StatusForbidden, rpc.CodePermissionDenied)
				if !strings.Contains(e.Message, mentions) {
					t.Errorf("%s: message %q does not mention %s", target.pattern, e.Message, mentions)
				}
			}
			denied(s.Issue(t, keys.IssueRequest{Scopes: others}), "", string(target.scope))
			denied(team, "default", `"team"`)
			denied(team, "other", `"team"`)
			denied(teams, "", `the request names no namespace, which means "default"`)
			if calls := d.takeCalls(); calls != nil {
				t.Errorf("%s: refused requests reached the sandbox: %q", target.pattern, calls)
			}
			for _, c := range []struct{ key, namespace, in string }{
				{s.Key, "", "default"}, {s.Key, "team", "team"}, {team, "", "team"}, {team, "team", "team"}, {teams, "other", "other"},
				{s.Issue(t, keys.IssueRequest{Scopes: []keys.Scope{target.scope}}), "", "default"},
			} {
				w := send(target, c.key, c.namespace)
				calls := d.takeCalls()
				if strings.HasSuffix(target.pattern, "/exec") { // it reaches the sandbox only after the handshake
					calls = []string{" in " + c.in}
				} else if strings.HasSuffix(target.pattern, "{port}") {
					target.status = http.StatusNotFound
				}
				if w.Code != target.status || len(calls) != 1 || !strings.HasSuffix(calls[0], " in "+c.in) {
					t.Errorf("%s in %q: got %d %s and calls %q, want %d and one in %s", target.pattern, c.namespace, w.Code, w.Body, calls, target.status, c.in)
				}
			}
		}
	})
}
