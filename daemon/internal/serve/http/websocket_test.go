package http_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// withWebSocket adds a WebSocket endpoint at testPath. Its Serve answers the handshake, says hello and waits for the end of
// the request.
func withWebSocket(changes ...func(*gateway.Endpoint)) func(*Setup) {
	serve := func(_ *gateway.Call, w http.ResponseWriter, r *http.Request) error {
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "websocket")
		w.WriteHeader(http.StatusSwitchingProtocols)
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return err
		}
		io.WriteString(conn, "hello")
		<-r.Context().Done()
		_, err = fmt.Fprintf(conn, "unauthorized: %t", errdefs.IsUnauthorized(context.Cause(r.Context())))
		return err
	}
	return withEndpoint(serve, append([]func(*gateway.Endpoint){func(e *gateway.Endpoint) {
		e.Pattern, e.Scope, e.Body, e.WebSocket = "GET "+testPath, keys.ScopeExec, gateway.Body{}, true
	}}, changes...)...)
}

// handshake sends a request with these lines of headers and returns the response and what follows it.
func handshake(t *testing.T, addr string, headers ...string) (*http.Response, *bufio.Reader) {
	t.Helper()
	conn := dialTest(t, addr)
	fmt.Fprintf(conn, "GET /test/one HTTP/1.1\r\nHost: %s\r\n%s\r\n\r\n", addr, strings.Join(headers, "\r\n"))
	in := bufio.NewReader(conn)
	res, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	return res, in
}

var upgrade = []string{"Connection: keep-alive, Upgrade", "Upgrade: WebSocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="}

// A handshake may have the API key in the subprotocols, because web pages cannot set headers. No other request may.
func TestWebSocketKey(t *testing.T) {
	s := New(t, withWebSocket(), withWebSocket(func(e *gateway.Endpoint) { e.Pattern, e.WebSocket = "GET /other", false }))
	addr, stop := s.Listen(t)
	defer stop()
	s.SetDrain(0) // the connections stay open
	protocols := func(p string) string { return "Sec-WebSocket-Protocol: " + p }
	weak := s.Issue(t, keys.IssueRequest{Scopes: []keys.Scope{keys.ScopeRead}})
	for name, c := range map[string]struct {
		headers []string
		status  int
	}{
		"header":                          {[]string{"Authorization: Bearer " + s.Key}, 101},
		"subprotocol":                     {[]string{protocols("msb, msb.key." + s.Key)}, 101},
		"subprotocols in two headers":     {[]string{protocols("msb"), protocols("msb.key." + s.Key)}, 101},
		"other order, no spaces":          {[]string{protocols("msb.key." + s.Key + ",msb")}, 101},
		"no key":                          {nil, 401},
		"empty key":                       {[]string{protocols("msb, msb.key.")}, 401},
		"invalid key":                     {[]string{protocols("msb, msb.key.msb_x")}, 401},
		"two keys":                        {[]string{protocols("msb, msb.key." + s.Key + ", msb.key." + s.Key)}, 401},
		"key without prefix":              {[]string{protocols("msb, " + s.Key)}, 401},
		"Authorization overrides":         {[]string{"Authorization: Bearer msb_x", protocols("msb.key." + s.Key)}, 401},
		"an empty Authorization":          {[]string{"Authorization: ", protocols("msb.key." + s.Key)}, 401},
		"Proxy-Authorization overrides":   {[]string{"Proxy-Authorization: Bearer msb_x", protocols("msb.key." + s.Key)}, 401},
		"key without the scope":           {[]string{protocols("msb, msb.key." + weak)}, 403},
		"a web page of another site":      {[]string{protocols("msb, msb.key." + s.Key), "Origin: https://example.com"}, 101},
		"the key of a header is the only": {[]string{"Authorization: Bearer " + s.Key, protocols("msb, msb.key.msb_x")}, 101},
	} {
		if res, _ := handshake(t, addr, append(c.headers, upgrade...)...); res.StatusCode != c.status {
			t.Errorf("%s: status %s, want %d", name, res.Status, c.status)
		}
	}
	if w := s.Post("", At(http.MethodGet, "/other"), func(r *http.Request) {
		r.Header.Del("Authorization")
		r.Header.Set("Sec-WebSocket-Protocol", "msb, msb.key."+s.Key)
	}); w.Code != http.StatusUnauthorized {
		t.Errorf("a path that is no WebSocket accepts the subprotocol as a key: status %d", w.Code)
	}
	stop()
	if log := s.Log.String(); strings.Contains(log, s.Key) || strings.Contains(log, weak) || strings.Contains(log, strings.TrimPrefix(s.Key, "msb_")) {
		t.Error("the log contains a key")
	}
}

// A request that is no handshake gets an error that says what the path is.
func TestWebSocketHandshake(t *testing.T) {
	s := New(t, withWebSocket())
	addr, stop := s.Listen(t)
	defer stop()
	for name, lines := range map[string][]string{
		"plain":             nil,
		"no Connection":     upgrade[1:],
		"another protocol":  {upgrade[0], "Upgrade: h2c", upgrade[2], upgrade[3]},
		"an old version":    {upgrade[0], upgrade[1], "Sec-WebSocket-Version: 8", upgrade[3]},
		"without a version": {upgrade[0], upgrade[1], upgrade[3]},
	} {
		res, _ := handshake(t, addr, append([]string{"Authorization: " + s.Key}, lines...)...)
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode != http.StatusUpgradeRequired || res.Header.Get("Upgrade") != "websocket" || res.Header.Get("Connection") != "Upgrade" ||
			res.Header.Get("Sec-WebSocket-Version") != "13" || !strings.Contains(string(body), `"code":-32600,"message":"this path is a WebSocket;`) {
			t.Errorf("%s: response is %s %v %s, want a 426 with the supported version", name, res.Status, res.Header, body)
		}
	}
	w := s.Post("", At(http.MethodGet, "/test/one"), WithHeader("Connection", "upgrade"), WithHeader("Upgrade", "websocket"), func(r *http.Request) { r.ProtoMajor = 2 })
	if e := WantError(t, w, http.StatusBadRequest, rpc.CodeInvalidParams); !strings.Contains(e.Message, "HTTP/1.1") {
		t.Errorf("over HTTP/2: message %q", e.Message)
	}
}

// The endpoint's status and headers are sent before the connection is hijacked. When the key is revoked, the endpoint can
// still send the client the reason, but the connection is closed soon, whatever the endpoint does.
func TestWebSocketEndsWithItsKey(t *testing.T) {
	began := make(chan struct{})
	s := New(t, withWebSocket(), withEndpoint(func(_ *gateway.Call, w http.ResponseWriter, r *http.Request) error {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return err
		}
		close(began)
		_, err = io.Copy(io.Discard, conn) // until the connection is closed
		return err
	}, func(e *gateway.Endpoint) { e.Pattern, e.Body = "GET /blocked", gateway.Body{} }))
	addr, stop := s.Listen(t)
	defer stop()
	key, id := s.IssueNamed(t, keys.IssueRequest{})
	res, in := handshake(t, addr, append([]string{"Authorization: " + key}, upgrade...)...)
	if res.StatusCode != http.StatusSwitchingProtocols || res.Header.Get("Upgrade") != "websocket" || res.Header.Get("Connection") != "Upgrade" ||
		res.Header.Get("X-Request-Id") == "" || res.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("response is %s %v, want 101 with the headers of the endpoint and the gateway", res.Status, res.Header)
	}
	blocked := dialTest(t, addr)
	fmt.Fprintf(blocked, "GET /blocked HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\n\r\n", key)
	<-began
	hello := make([]byte, len("hello"))
	if _, err := io.ReadFull(in, hello); err != nil || string(hello) != "hello" {
		t.Errorf("read %q, error %v; want hello", hello, err)
	}
	if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(in); err != nil || string(rest) != "unauthorized: true" {
		t.Errorf("read %q, error %v; want what the endpoint wrote after the key was revoked", rest, err)
	}
	io.ReadAll(blocked) // ends
}

// If the key is revoked during an upload, the request ends even if its client sends nothing.
func TestUploadEndsWithItsKey(t *testing.T) {
	reading := make(chan struct{})
	s := New(t, withEndpoint(func(_ *gateway.Call, _ http.ResponseWriter, r *http.Request) error {
		if _, err := io.ReadFull(r.Body, make([]byte, 3)); err != nil {
			return err
		}
		close(reading)
		_, err := io.Copy(io.Discard, r.Body)
		if !errdefs.IsUnauthorized(err) {
			t.Errorf("the body ends with error %v, want the cause", err)
		}
		return err
	}, func(e *gateway.Endpoint) { e.Body = gateway.Stream(1 << 20) }))
	addr, stop := s.Listen(t)
	defer stop()
	key, id := s.IssueNamed(t, keys.IssueRequest{})
	conn := dialTest(t, addr)
	fmt.Fprintf(conn, "POST /test/one HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nContent-Length: 1000\r\n\r\nabc", key)
	<-reading
	if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || res.StatusCode != http.StatusUnauthorized {
		t.Errorf("response is %v, error %v; want a 401", res, err)
	}
}

// A refused upload gets its response although the client sends nothing of the body.
func TestRefusedUploadIsNotRead(t *testing.T) {
	s := New(t, withEndpoint(func(*gateway.Call, http.ResponseWriter, *http.Request) error {
		return fmt.Errorf("no such file: %w", errdefs.ErrNotFound)
	}, func(e *gateway.Endpoint) { e.Body = gateway.Stream(1 << 20) }))
	addr, stop := s.Listen(t)
	defer stop()
	for key, status := range map[string]int{s.Key: http.StatusNotFound, "msb_x": http.StatusUnauthorized} {
		conn := dialTest(t, addr)
		fmt.Fprintf(conn, "POST /test/one HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nContent-Length: 1000\r\n\r\n", key)
		if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || res.StatusCode != status {
			t.Errorf("response is %v, error %v; want status %d", res, err, status)
		}
		conn.Close()
	}
}

// What an endpoint does not read of a body is never taken for another request, and the client gets the response.
func TestUnreadBodyIsNoRequest(t *testing.T) {
	s := New(t, withEndpoint(func(_ *gateway.Call, w http.ResponseWriter, r *http.Request) error {
		if r.PathValue("name") == "flush" {
			return http.NewResponseController(w).Flush()
		}
		return fmt.Errorf("no such file: %w", errdefs.ErrNotFound)
	}, func(e *gateway.Endpoint) { e.Body = gateway.Stream(1 << 30) }))
	addr, stop := s.Listen(t)
	defer stop()
	second := "GET /api/v1/health HTTP/1.1\r\nHost: x\r\n\r\n"
	for _, name := range []string{"one", "flush"} {
		for _, size := range []int{0, 10, 256 << 10, 1 << 20} {
			conn := dialTest(t, addr)
			body := strings.Repeat("x", size) + second
			go fmt.Fprintf(conn, "POST /test/%s HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nContent-Length: %d\r\n\r\n%s", name, s.Key, len(body), body)
			in := bufio.NewReader(conn)
			res, err := http.ReadResponse(in, nil)
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(res.Body)
			if want := name == "one"; err != nil || strings.Contains(string(text), "no such file") != want || !res.Close {
				t.Errorf("%s, %d bytes: response is %s %v %s, error %v; want one that closes the connection", name, size, res.Status, res.Header, text, err)
			}
			if rest, _ := io.ReadAll(in); len(rest) > 0 { // its error may be a reset, because the body was not read
				t.Errorf("%s, %d bytes: the response is followed by %q", name, size, rest)
			}
		}
	}
	if strings.Contains(s.Log.String(), "panic") {
		t.Error("the log has a panic:", s.Log)
	}
}
