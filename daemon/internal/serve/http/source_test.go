package http_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// Only a proxy that is trusted is believed whom it asks for, and only as far as it knows itself.
func TestClientsBehindProxies(t *testing.T) {
	s := New(t, func(o *Setup) {
		o.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32"), netip.MustParsePrefix("10.1.0.0/24")}
	})
	for _, c := range []struct {
		from string
		said []string
		want string
	}{
		{"192.0.2.1:80", []string{"198.51.100.7"}, "192.0.2.1"},
		{"127.0.0.1:80", nil, "127.0.0.1"},
		{"127.0.0.1:80", []string{"198.51.100.7"}, "198.51.100.7"},
		{"127.0.0.1:80", []string{"203.0.113.9, 198.51.100.7"}, "198.51.100.7"}, // the first is what the client said
		{"127.0.0.1:80", []string{"203.0.113.9", "198.51.100.7,10.1.0.3"}, "198.51.100.7"},
		{"127.0.0.1:80", []string{"203.0.113.9, nonsense, 10.1.0.3"}, "10.1.0.3"},
		{"127.0.0.1:80", []string{"::ffff:198.51.100.7"}, "198.51.100.7"},
		{"127.0.0.1:80", []string{""}, "127.0.0.1"},
	} {
		r := httptest.NewRequest(http.MethodPost, rpc.Path, nil)
		r.RemoteAddr = c.from
		r.Header["X-Forwarded-For"] = c.said
		if got := s.ClientIP(r).String(); got != c.want {
			t.Errorf("%s says %q: %s, want %s", c.from, c.said, got, c.want)
		}
	}

	// Behind one proxy, a client that tries bad keys keeps nobody else out; the log names it.
	behind := func(client string) func(*http.Request) {
		return func(r *http.Request) {
			r.RemoteAddr = "127.0.0.1:4321"
			r.Header.Set("X-Forwarded-For", client)
		}
	}
	body := Request("sandbox.metrics.get", "{}")
	for i := range gateway.BadKeysBurst {
		WantError(t, s.Post(body, WithKey(fmt.Sprint("msb_wrong", i)), behind("203.0.113.9")), http.StatusUnauthorized, rpc.CodeUnauthenticated)
	}
	fresh := s.Issue(t, keys.IssueRequest{})
	WantError(t, s.Post(body, WithKey(fresh), behind("203.0.113.9")), http.StatusTooManyRequests, rpc.CodeExhausted)
	WantOK(t, s.Post(body, WithKey(fresh), behind("198.51.100.7")))
	if log := s.Log.String(); !strings.Contains(log, "source=203.0.113.9 ") || !strings.Contains(log, "source=198.51.100.7 ") {
		t.Error("the log does not name them:", log)
	}
}
