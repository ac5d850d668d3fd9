package http_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/msbd/msbd/api/rpc"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

func TestAuthorizationHeaders(t *testing.T) {
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

// The test sends what a browser sends for each way in which a web page can make it send a request, as observed on the
// wire.
func TestDevModeRefusesWebPages(t *testing.T) {
	s := New(t, func(o *Setup) { o.Dev = true })
	body := Request("sandbox.metrics.get", "{}")
	withHost := func(host string) func(*http.Request) { return func(r *http.Request) { r.Host = host } }
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
		"navigation to the root":    {At(http.MethodGet, rpc.RootPath), headers("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate")},
		"image":                     {At(http.MethodGet, rpc.HealthPath), headers("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "image")},
		"script of /metrics":        {At(http.MethodGet, rpc.MetricsPath), headers("Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors", "Sec-Fetch-Dest", "script")},
		"fetch of /metrics":         {At(http.MethodGet, rpc.MetricsPath), headers("Origin", evil, "Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "cors")},
		"page on another port":      {headers("Origin", "http://localhost:3000", "Sec-Fetch-Site", "same-site")},
		"image on another port":     {At(http.MethodGet, rpc.MetricsPath), headers("Sec-Fetch-Site", "same-site")},
		"two Sec-Fetch-Site":        {At(http.MethodGet, rpc.MetricsPath), headers("Sec-Fetch-Site", "none", "Sec-Fetch-Site", "cross-site")},
		"empty Sec-Fetch-Site":      {At(http.MethodGet, rpc.MetricsPath), headers("Sec-Fetch-Site", "")},
		"two origins":               {headers("Origin", "http://localhost:5555", "Origin", evil)},
		"lying browser":             {headers("Origin", "http://evil", "Sec-Fetch-Site", "same-origin")},
	}
	// DNS rebinding: a name of the attacker resolves to this machine, so that the browser treats the page as same-origin.
	rebound := map[string]string{
		"rebound name": "evil.example:5555", "private address": "192.168.1.1:5555", "unspecified address": "0.0.0.0:5555", "no host": "",
		"name below localhost": "evil.localhost:5555", "localhost as a label": "localhost.evil.example", "trailing dot": "localhost.:5555", "two hosts": "localhost:5555,evil.example",
	}
	for name, host := range rebound {
		sameOrigin := headers("Origin", "http://"+host, "Sec-Fetch-Site", "same-origin")
		attacks[name] = []func(*http.Request){withHost(host), sameOrigin}
		attacks[name+", health"] = []func(*http.Request){withHost(host), sameOrigin, At(http.MethodGet, rpc.HealthPath)}
		attacks[name+", metrics"] = []func(*http.Request){withHost(host), sameOrigin, At(http.MethodGet, rpc.MetricsPath)}
		attacks[name+", root"] = []func(*http.Request){withHost(host), sameOrigin, At(http.MethodGet, rpc.RootPath)}
		attacks[name+", unknown path"] = []func(*http.Request){withHost(host), sameOrigin, At(http.MethodGet, "/unknown")}
	}
	for name, changes := range attacks {
		t.Run(name, func(t *testing.T) {
			w := s.Post(body, append([]func(*http.Request){withHost("localhost:5555")}, changes...)...)
			WantError(t, w, http.StatusForbidden, rpc.CodePermissionDenied)
			for h := range w.Header() {
				if strings.HasPrefix(h, "Access-Control-") {
					t.Error("the response has a CORS header:", h)
				}
			}
			if w.Header().Get("X-Content-Type-Options") != "nosniff" {
				t.Error("the response lacks X-Content-Type-Options: nosniff")
			}
		})
	}
	// A page can send these content types without a CORS preflight, so they are refused even if no other check applies.
	for _, contentType := range []string{"text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""} {
		WantError(t, s.Post(body, withHost("localhost"), WithHeader("Content-Type", contentType)), http.StatusUnsupportedMediaType, rpc.CodeInvalidRequest)
	}
}

// Dev mode accepts requests from programs and from the address bar of a browser, with any key or none.
func TestDevMode(t *testing.T) {
	s := New(t, func(o *Setup) { o.Dev = true })
	body := Request("sandbox.metrics.get", "{}")
	withHost := func(host string) func(*http.Request) { return func(r *http.Request) { r.Host = host } }
	for _, host := range []string{"localhost:5555", "127.0.0.1:5555", "127.0.0.1", "[::1]:5555", "[::1]", "LOCALHOST"} {
		WantOK(t, s.Post(body, withHost(host), WithKey("")))
		WantOK(t, s.Post(body, withHost(host), WithKey("anything")))
		WantOK(t, s.Post(body, withHost(host), WithHeader("Origin", "http://"+host)))
		for _, path := range []string{rpc.RootPath, rpc.HealthPath, rpc.MetricsPath} {
			if w := s.Post("", withHost(host), WithKey(""), At(http.MethodGet, path), WithHeader("Sec-Fetch-Site", "none")); w.Code != http.StatusOK {
				t.Errorf("GET %s with host %s: response is %d %s, want 200", path, host, w.Code, w.Body)
			}
		}
	}
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a","namespace":"any"}`), withHost("localhost"), WithKey("")))
}
