package e2e

import (
	"bufio"
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

//go:embed testdata/hostile.html
var hostilePage string

// TestWebPageCannotControlServer loads a hostile page in a real browser, from every kind of origin that a page can
// have. The server is in dev mode, so that no API key protects it.
func TestWebPageCannotControlServer(t *testing.T) {
	parallel(t)
	s, _ := pythonServer(t, "--dev")
	a := attack(t, s.address)
	for _, x := range a.exchanges {
		// A GET changes nothing. Whether the page could read the response is checked below.
		allowed := x.Method == http.MethodGet && x.Host != a.reboundHost
		if x.status != http.StatusForbidden && !allowed {
			t.Errorf("%s %s from the origin %q to %s: got HTTP %d %s, want 403", x.Method, x.URL, x.Header.Get("Origin"), x.Host, x.status, x.body)
		}
	}
	for attempt, text := range a.responses {
		// After DNS rebinding, the page and the server have the same origin, so the page can read the refusals.
		if text != "" && !(strings.HasPrefix(attempt, "rebound-") && strings.Contains(text, `"code":-32004`)) {
			t.Errorf("attempt %s could read the response %q", attempt, text)
		}
	}
	if ids := s.sandboxIDs(); len(ids) != 0 {
		t.Errorf("sandboxes were started: %s", s.mustMSB(t, "server", "list"))
	}
	log := s.log.String()
	for _, source := range append(a.origins, a.reboundHost) {
		if !strings.Contains(log, source) {
			t.Errorf("the log contains no refused request from %s", source)
		}
	}
	// The server accepts the same request if no browser sends it.
	s.mustCall(t, "", "sandbox.start", params{"sandbox": "control"}, nil)
	if ids := s.sandboxIDs(); len(ids) != 1 {
		t.Errorf("the server has the sandboxes %q, want only the one of this test", ids)
	}
}

// TestHostilePageControlsUnprotectedServer tests that the hostile page of TestWebPageCannotControlServer does control a
// server that has no protection against web pages.
func TestHostilePageControlsUnprotectedServer(t *testing.T) {
	parallel(t)
	var mu sync.Mutex
	started := map[string]bool{}
	unprotected := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Access-Control-Allow-Origin", r.Header.Get("Origin"))
		h.Set("Access-Control-Allow-Credentials", "true")
		h.Set("Access-Control-Allow-Methods", "PUT")
		h.Set("Access-Control-Allow-Headers", r.Header.Get("Access-Control-Request-Headers"))
		var call struct{ Params struct{ Sandbox string } }
		if json.NewDecoder(r.Body).Decode(&call) == nil {
			mu.Lock()
			started[call.Params.Sandbox] = true
			mu.Unlock()
		}
		fmt.Fprint(w, "accepted")
	}))
	defer unprotected.Close()
	a := attack(t, strings.TrimPrefix(unprotected.URL, "http://"))

	mu.Lock()
	defer mu.Unlock()
	for _, attempt := range a.attempts {
		kind := strings.SplitN(attempt, "-", 3)[2]
		switch verb, _, _ := strings.Cut(kind, "-"); {
		case slices.Contains([]string{"json", "xhr", "put", "fetch"}, verb) && !strings.Contains(kind, "opaque") && a.responses[attempt] != "accepted":
			t.Errorf("attempt %s could not read the response", attempt)
		case slices.Contains([]string{"fetch", "img", "script", "style", "frame", "eventsource"}, verb): // GET requests start nothing
		case slices.Contains([]string{"form-urlencoded", "form-multipart", "websocket"}, kind): // no JSON over HTTP
		case !started[attempt]:
			t.Errorf("attempt %s did not start a sandbox", attempt)
		}
	}
}

// attackResult is what the hostile page did, from all its origins together.
type attackResult struct {
	attempts    []string          // the names of the attempts
	responses   map[string]string // the response text that the page could read, by attempt
	exchanges   []exchange        // the browser's requests and the server's responses
	origins     []string          // the origins of the requests
	reboundHost string            // the attacker's host name with the server's port, for DNS rebinding
}

// attack loads the hostile page in a browser from every origin, and returns when the server has responded to every
// attempt.
func attack(t *testing.T, server string) attackResult {
	t.Helper()
	proxy := newRecordingProxy(t, server)
	_, port, _ := net.SplitHostPort(proxy.address)
	targets := []string{"http://127.0.0.1:" + port, "http://localhost:" + port, "http://evil.test:" + port}

	type report struct {
		Page      string
		Attempts  []string          `json:"made"`
		Responses map[string]string `json:"heard"`
	}
	reports := make(chan report, 1) // one page at a time is loaded
	mux := http.NewServeMux()
	hostile := httptest.NewServer(mux)
	defer hostile.Close()
	page := func(name string) []byte {
		config, _ := json.Marshal(map[string]any{"page": name, "home": hostile.URL, "targets": targets})
		return []byte(strings.Replace(hostilePage, "= CONFIG;", "= "+string(config)+";", 1))
	}
	mux.HandleFunc("GET /page/{name}", func(w http.ResponseWriter, r *http.Request) { w.Write(page(r.PathValue("name"))) })
	mux.HandleFunc("GET /sandboxed", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `<!doctype html><iframe sandbox="allow-scripts allow-forms allow-popups" src="/page/frame"></iframe>`)
	})
	mux.HandleFunc("POST /redirect", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, r.FormValue("to"), http.StatusTemporaryRedirect)
	})
	mux.HandleFunc("POST /heard", func(_ http.ResponseWriter, r *http.Request) {
		var rep report
		if err := json.NewDecoder(r.Body).Decode(&rep); err != nil {
			t.Error(err)
		}
		reports <- rep
	})
	proxy.serve(page("rebound"))
	file := filepath.Join(t.TempDir(), "page.html")
	if err := os.WriteFile(file, page("file"), 0o600); err != nil {
		t.Fatal(err)
	}

	a := attackResult{responses: map[string]string{}, reboundHost: "evil.test:" + port}
	hostileURL := func(host string) string { return strings.Replace(hostile.URL, "127.0.0.1", host, 1) }
	a.origins = []string{hostileURL("127.0.0.1"), hostileURL("localhost"), hostileURL("evil.test"), "null", "http://" + a.reboundHost}
	b := startBrowser(t)
	defer b.close(t)
	for _, place := range []struct{ name, url string }{
		{"rebound", "http://" + a.reboundHost + hostilePath}, // first, while the browser has no connection to that host yet
		{"address", hostileURL("127.0.0.1") + "/page/address"},
		{"localhost", hostileURL("localhost") + "/page/localhost"},
		{"evil", hostileURL("evil.test") + "/page/evil"},
		{"file", "file://" + file},
		{"frame", hostileURL("127.0.0.1") + "/sandboxed"}, // its origin is null
	} {
		b.open(t, place.url)
		select {
		case rep := <-reports:
			if rep.Page != place.name || len(rep.Attempts) < 100 {
				t.Fatalf("page %s reports %+v, want at least 100 attempts", place.name, rep)
			}
			a.attempts = append(a.attempts, rep.Attempts...)
			maps.Copy(a.responses, rep.Responses)
		case <-time.After(hung):
			t.Fatalf("page %s sent no report; the output of the browser:\n%s", place.name, b.log)
		}
	}
	// Navigate to the server, as by a link.
	b.open(t, "http://"+a.reboundHost+"/api/v1/health?try=visit")
	unanswered := append(slices.Clone(a.attempts), "visit")
	defer func() {
		if t.Failed() {
			t.Logf("attempts without a response: %q", unanswered)
		}
	}()
	until(t, "the responses to all attempts", func() bool {
		a.exchanges = proxy.exchanges(t)
		answered := map[string]bool{}
		for _, x := range a.exchanges {
			answered[x.URL.Query().Get("try")] = true
		}
		unanswered = slices.DeleteFunc(unanswered, func(attempt string) bool { return answered[attempt] })
		return len(unanswered) == 0
	})
	return a
}

// browser is headless Chromium, with less protection of local servers than it has by default.
type browser struct {
	cmd     *exec.Cmd
	profile string
	debug   string // address of DevTools
	log     *output
}

func startBrowser(t *testing.T) *browser {
	t.Helper()
	const chromium = "/usr/bin/chromium"
	if _, err := os.Stat(chromium); err != nil {
		t.Fatal("install chromium (make test does)")
	}
	b := &browser{profile: t.TempDir(), log: &output{}}
	b.cmd = exec.Command(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--user-data-dir="+b.profile,
		"--remote-debugging-port=0", "--host-resolver-rules=MAP evil.test 127.0.0.1", "--disable-popup-blocking",
		// Turn off Chromium's protection of local servers, because other browsers have none.
		"--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests",
		"--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-breakpad", "about:blank")
	b.cmd.Stdout, b.cmd.Stderr = b.log, b.log
	b.cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + b.profile, "TMPDIR=" + b.profile}
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that close can kill all its processes
	if err := b.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, "the start of the browser", func() bool {
		text, err := os.ReadFile(filepath.Join(b.profile, "DevToolsActivePort"))
		port, _, complete := strings.Cut(string(text), "\n")
		b.debug = "127.0.0.1:" + port
		return err == nil && complete
	})
	return b
}

// open loads a page in a new tab.
func (b *browser) open(t *testing.T, page string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodPut, "http://"+b.debug+"/json/new?"+url.QueryEscape(page), nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatalf("open %s: %v; the output of the browser:\n%s", page, err, b.log)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Fatalf("open %s: %s", page, res.Status)
	}
}

// close kills the browser and waits until all its processes have ended.
func (b *browser) close(t *testing.T) {
	syscall.Kill(-b.cmd.Process.Pid, syscall.SIGKILL)
	b.cmd.Wait()
	until(t, "the end of the browser's processes", func() bool { return len(processes(b.profile, "chromium")) == 0 })
}

// hostilePath is the path at which a recordingProxy serves the hostile page.
const hostilePath = "/page"

// recordingProxy forwards connections from a browser to a server and records their bytes. It also simulates DNS
// rebinding, in which the attacker's name resolves first to the attacker's server, which serves the page, and then to
// the attacked server: the proxy itself serves hostilePath and forwards every other request.
type recordingProxy struct {
	address, server string
	listener        net.Listener
	mu              sync.Mutex
	connections     []*connection
}

// connection is the recorded bytes of a connection in both directions.
type connection struct{ requests, responses bytes.Buffer }

// exchange is a request and its response.
type exchange struct {
	*http.Request
	status int
	body   []byte
}

// newRecordingProxy listens on a free port. The caller must call serve.
func newRecordingProxy(t *testing.T, server string) *recordingProxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return &recordingProxy{address: l.Addr().String(), server: server, listener: l}
}

// serve accepts connections in the background. page is the hostile page.
func (p *recordingProxy) serve(page []byte) {
	go func() {
		for {
			c, err := p.listener.Accept()
			if err != nil {
				return
			}
			go p.handle(c, page)
		}
	}()
}

// handle serves or forwards one connection.
func (p *recordingProxy) handle(client net.Conn, page []byte) {
	defer client.Close()
	in := bufio.NewReader(client)
	if line, _ := in.Peek(len("GET " + hostilePath)); string(line) == "GET "+hostilePath {
		fmt.Fprintf(client, "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(page), page)
		return
	}
	server, err := net.Dial("tcp", p.server)
	if err != nil {
		return
	}
	defer server.Close()
	c := &connection{}
	p.mu.Lock()
	p.connections = append(p.connections, c)
	p.mu.Unlock()
	go func() {
		io.Copy(io.MultiWriter(p.recorder(&c.requests), server), in)
		server.(*net.TCPConn).CloseWrite()
	}()
	io.Copy(io.MultiWriter(p.recorder(&c.responses), client), server)
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// recorder returns a writer that appends to b while it holds p.mu.
func (p *recordingProxy) recorder(b *bytes.Buffer) io.Writer {
	return writerFunc(func(data []byte) (int, error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		return b.Write(data)
	})
}

// exchanges parses the recorded bytes and returns the requests whose responses are complete.
func (p *recordingProxy) exchanges(t *testing.T) (all []exchange) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.connections {
		requests := bufio.NewReader(bytes.NewReader(c.requests.Bytes()))
		responses := bufio.NewReader(bytes.NewReader(c.responses.Bytes()))
		for {
			req, err := http.ReadRequest(requests)
			if err != nil {
				break
			}
			io.Copy(io.Discard, req.Body)
			res, err := http.ReadResponse(responses, req)
			if err != nil {
				break
			}
			body, err := io.ReadAll(res.Body)
			if err != nil {
				break
			}
			all = append(all, exchange{req, res.StatusCode, body})
		}
	}
	return all
}
