package http_test

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/msbd/msbd/api/rpc"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// X-Forwarded-For is honored only from trusted proxies. It determines the client only up to the last address that is
// not a trusted proxy.
func TestTrustedProxies(t *testing.T) {
	s := New(t, func(o *Setup) {
		o.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32"), netip.MustParsePrefix("10.1.0.0/24")}
	})
	for _, c := range []struct {
		from         string
		forwardedFor []string
		want         string
	}{
		{"192.0.2.1:80", []string{"198.51.100.7"}, "192.0.2.1"},
		{"127.0.0.1:80", nil, "127.0.0.1"},
		{"127.0.0.1:80", []string{"198.51.100.7"}, "198.51.100.7"},
		{"127.0.0.1:80", []string{"203.0.113.9, 198.51.100.7"}, "198.51.100.7"}, // the client itself sent the first address
		{"127.0.0.1:80", []string{"203.0.113.9", "198.51.100.7,10.1.0.3"}, "198.51.100.7"},
		{"127.0.0.1:80", []string{"203.0.113.9, nonsense, 10.1.0.3"}, "10.1.0.3"},
		{"127.0.0.1:80", []string{"::ffff:198.51.100.7"}, "198.51.100.7"},
		{"127.0.0.1:80", []string{""}, "127.0.0.1"},
	} {
		r := httptest.NewRequest(http.MethodPost, rpc.Path, nil)
		r.RemoteAddr = c.from
		r.Header["X-Forwarded-For"] = c.forwardedFor
		if got := s.ClientIP(r).String(); got != c.want {
			t.Errorf("client of a request from %s with X-Forwarded-For %q is %s, want %s", c.from, c.forwardedFor, got, c.want)
		}
	}
}

// The log has the address of each client behind a trusted proxy.
func TestLogOfClientsBehindTrustedProxy(t *testing.T) {
	s := New(t, func(o *Setup) { o.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")} })
	behindProxy := func(client string) func(*http.Request) {
		return func(r *http.Request) {
			r.RemoteAddr = "127.0.0.1:4321"
			r.Header.Set("X-Forwarded-For", client)
		}
	}
	body := Request("sandbox.metrics.get", "{}")
	WantError(t, s.Post(body, WithKey("msb_wrong"), behindProxy("203.0.113.9")), http.StatusUnauthorized, rpc.CodeUnauthenticated)
	WantOK(t, s.Post(body, behindProxy("198.51.100.7")))
	if log := s.Log.String(); !strings.Contains(log, "source=203.0.113.9 ") || !strings.Contains(log, "source=198.51.100.7 ") {
		t.Error("the log lacks the addresses of the clients:", log)
	}
}
