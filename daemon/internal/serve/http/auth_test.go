package http_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

func TestHeaderForms(t *testing.T) {
	s := New(t)
	body := Request("sandbox.metrics.get", "{}")
	for _, form := range []string{"Bearer %s", "bearer %s", "BEARER  %s", "%s"} {
		value := fmt.Sprintf(form, s.Key)
		WantOK(t, s.Post(body, WithKey(value)))
		WantOK(t, s.Post(body, WithHeader("Proxy-Authorization", value), WithKey("Bearer wrong")))
		WantOK(t, s.Post(body, WithHeader("Proxy-Authorization", value), func(r *http.Request) { r.Header.Del("Authorization") }))
	}
	for _, bad := range []func(*http.Request){
		WithHeader("Proxy-Authorization", "Bearer wrong"),
		WithHeader("Proxy-Authorization", ""),
		func(r *http.Request) { r.Header.Add("Authorization", "Bearer "+s.Key) },
		WithKey("Bearer, " + s.Key),
		WithKey("Bearer\t" + s.Key),
		WithKey("Token " + s.Key),
	} {
		WantError(t, s.Post(body, bad), http.StatusUnauthorized, rpc.CodeUnauthenticated)
	}
}

func TestBadKeyFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(t)
		fresh := s.Issue(t, keys.IssueRequest{})
		body := Request("sandbox.metrics.get", "{}")
		WantOK(t, s.Post(body))
		for i := range gateway.BadKeysBurst {
			WantError(t, s.Post(body, WithKey(fmt.Sprint("msb_wrong", i))), http.StatusUnauthorized, rpc.CodeUnauthenticated)
		}
		w := s.Post(body, WithKey("msb_wrong"))
		WantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
		if w.Header().Get("Retry-After") == "" {
			t.Error("no Retry-After")
		}
		if strings.Contains(s.Log.String(), gateway.ErrTooManyBadKeys) {
			t.Error("a flood fills the log")
		}
		WantError(t, s.Post(body, WithKey(fresh)), http.StatusTooManyRequests, rpc.CodeExhausted)
		// Others behind the same address, other addresses, and requests without a key are not held up.
		WantOK(t, s.Post(body))
		WantOK(t, s.Post(body, WithKey(fresh), func(r *http.Request) { r.RemoteAddr = "192.0.2.77:1" }))
		WantError(t, s.Post(body, WithKey("")), http.StatusUnauthorized, rpc.CodeUnauthenticated)
		time.Sleep(time.Second)
		WantOK(t, s.Post(body, WithKey(fresh)))
	})
}

// A key that was accepted is checked also when its source is over the bound of bad ones. Once it has
// ended, it is one of those.
func TestEndedKeyIsABadKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(t)
		ended, id := s.IssueNamed(t, keys.IssueRequest{})
		body := Request("sandbox.metrics.get", "{}")
		WantOK(t, s.Post(body, WithKey(ended)))
		if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
			t.Fatal(err)
		}
		for range gateway.BadKeysBurst {
			WantError(t, s.Post(body, WithKey(ended)), http.StatusUnauthorized, rpc.CodeUnauthenticated)
		}
		WantError(t, s.Post(body, WithKey(ended)), http.StatusTooManyRequests, rpc.CodeExhausted)
	})
}

// What a browser sends, as it is seen on the wire, for each way in which a page can make it send something.
func TestDevModeRefusesWebPages(t *testing.T) {
	s := New(t, func(o *Setup) { o.Dev = true })
	body := Request("sandbox.metrics.get", "{}")
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
		"fetch without CORS":        {headers("Origin", evil, "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors"), WithHeader("Content-Type", "text/plain")},
		"form":                      {headers("Origin", evil, "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate"), WithHeader("Content-Type", "text/plain")},
		"form of an old browser":    {headers("Origin", evil), WithHeader("Content-Type", "application/x-www-form-urlencoded")},
		"form of a sandboxed frame": {headers("Origin", "null", "Sec-Fetch-Site", "cross-site")},
		"preflight":                 {At(http.MethodOptions, rpc.Path), headers("Origin", evil, "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "content-type", "Sec-Fetch-Site", "cross-site")},
		"WebSocket":                 {At(http.MethodGet, rpc.Path), headers("Origin", evil, "Upgrade", "websocket", "Connection", "Upgrade", "Sec-WebSocket-Key", "x", "Sec-WebSocket-Version", "13")},
		"navigation":                {At(http.MethodGet, rpc.HealthPath), headers("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate")},
		"image":                     {At(http.MethodGet, rpc.HealthPath), headers("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "image")},
		"script of /metrics":        {At(http.MethodGet, rpc.MetricsPath), headers("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "script")},
		"fetch of /metrics":         {At(http.MethodGet, rpc.MetricsPath), headers("Origin", evil, "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "cors")},
		"page of another port":      {headers("Origin", "http://localhost:3000", "Sec-Fetch-Site", "same-site")},
		"image on another port":     {At(http.MethodGet, rpc.MetricsPath), headers("Sec-Fetch-Site", "same-site")},
		"two answers":               {At(http.MethodGet, rpc.MetricsPath), headers("Sec-Fetch-Site", "none", "Sec-Fetch-Site", "cross-site")},
		"unheard-of site":           {At(http.MethodGet, rpc.MetricsPath), headers("Sec-Fetch-Site", "")},
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
		attacks[name+", health"] = []func(*http.Request){to(host), own, At(http.MethodGet, rpc.HealthPath)}
		attacks[name+", metrics"] = []func(*http.Request){to(host), own, At(http.MethodGet, rpc.MetricsPath)}
		attacks[name+", elsewhere"] = []func(*http.Request){to(host), own, At(http.MethodGet, "/")}
	}
	for name, changes := range attacks {
		t.Run(name, func(t *testing.T) {
			w := s.Post(body, append([]func(*http.Request){to("localhost:5555")}, changes...)...)
			WantError(t, w, http.StatusForbidden, rpc.CodePermissionDenied)
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
		WantError(t, s.Post(body, to("localhost"), WithHeader("Content-Type", kind)), http.StatusUnsupportedMediaType, rpc.CodeInvalidRequest)
	}
}

// Programs and the address bar of a browser are let in, with any key or none.
func TestDevMode(t *testing.T) {
	s := New(t, func(o *Setup) { o.Dev = true })
	body := Request("sandbox.metrics.get", "{}")
	to := func(host string) func(*http.Request) { return func(r *http.Request) { r.Host = host } }
	for _, host := range []string{"localhost:5555", "127.0.0.1:5555", "127.0.0.1", "[::1]:5555", "[::1]", "LOCALHOST"} {
		WantOK(t, s.Post(body, to(host), WithKey("")))
		WantOK(t, s.Post(body, to(host), WithKey("anything")))
		WantOK(t, s.Post(body, to(host), WithHeader("Origin", "http://"+host)))
		for _, path := range []string{rpc.HealthPath, rpc.MetricsPath} {
			if w := s.Post("", to(host), WithKey(""), At(http.MethodGet, path), WithHeader("Sec-Fetch-Site", "none")); w.Code != http.StatusOK {
				t.Errorf("%s at %s: %d %s", path, host, w.Code, w.Body)
			}
		}
	}
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a","namespace":"any"}`), to("localhost"), WithKey("")))
}
