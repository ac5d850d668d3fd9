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

// TestWebPageCannotControlServer lets a real browser load a hostile page from everywhere that a page can
// come from. The server is in dev mode, where no key protects it.
func TestWebPageCannotControlServer(t *testing.T) {
	parallel(t)
	s := testServer(t, "--dev")
	if err := s.importImages("python"); err != nil {
		t.Fatal(err)
	}
	a := attack(t, s.address)
	for _, x := range a.exchanges {
		// A GET changes nothing, and whether its answer could be read is looked at below.
		mayAnswer := x.Method == http.MethodGet && x.Host != a.rebound
		if x.status != http.StatusForbidden && !mayAnswer {
			t.Errorf("%s %s from the origin %q to %s: HTTP %d %s", x.Method, x.URL, x.Header.Get("Origin"), x.Host, x.status, x.body)
		}
	}
	for attempt, text := range a.heard {
		// Once its name has become the server's, the page may read the refusals.
		if text != "" && !(strings.HasPrefix(attempt, "rebound-") && strings.Contains(text, `"code":-32004`)) {
			t.Errorf("%s could read %q", attempt, text)
		}
	}
	if ids := s.sandboxIDs(); len(ids) != 0 {
		t.Errorf("sandboxes were started: %s", s.mustMSB(t, "server", "list"))
	}
	log := s.log.String()
	for _, who := range append(a.origins, a.rebound) {
		if !strings.Contains(log, who) {
			t.Errorf("the log names no refused request of %s", who)
		}
	}
	// The same request is a good one when no browser sends it.
	s.mustCall(t, "", "sandbox.start", params{"sandbox": "control"}, nil)
	if ids := s.sandboxIDs(); len(ids) != 1 {
		t.Errorf("started %q, want the control alone", ids)
	}
}

// TestHostilePageControlsUnprotectedServer proves that the page drives a server that does not protect itself.
func TestHostilePageControlsUnprotectedServer(t *testing.T) {
	parallel(t)
	var mu sync.Mutex
	started := map[string]bool{}
	weak := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
		fmt.Fprint(w, "driven")
	}))
	defer weak.Close()
	a := attack(t, strings.TrimPrefix(weak.URL, "http://"))

	mu.Lock()
	defer mu.Unlock()
	for _, attempt := range a.made {
		kind := strings.SplitN(attempt, "-", 3)[2]
		switch verb, _, _ := strings.Cut(kind, "-"); {
		case slices.Contains([]string{"json", "xhr", "put", "fetch"}, verb) && !strings.Contains(kind, "opaque") && a.heard[attempt] != "driven":
			t.Errorf("%s could not read the answer", attempt)
		case slices.Contains([]string{"fetch", "img", "script", "style", "frame", "eventsource"}, verb): // GETs
		case slices.Contains([]string{"form-urlencoded", "form-multipart", "websocket"}, kind): // not JSON over HTTP
		case !started[attempt]:
			t.Errorf("%s did not reach the server's heart", attempt)
		}
	}
}

// attackResult is what the hostile page did in all its places.
type attackResult struct {
	made      []string          // its attempts
	heard     map[string]string // what it could read of the answers, by attempt
	exchanges []exchange        // what the browser sent, and what the server answered
	origins   []string          // whence it was sent
	rebound   string            // the attacker's name with the server's port
}

// attack has a browser load the hostile page, and returns when the server has answered every attempt.
func attack(t *testing.T, server string) attackResult {
	t.Helper()
	tap := newRecordingProxy(t, server)
	_, port, _ := net.SplitHostPort(tap.address)
	targets := []string{"http://127.0.0.1:" + port, "http://localhost:" + port, "http://evil.test:" + port}

	type report struct {
		Page  string
		Made  []string
		Heard map[string]string
	}
	reports := make(chan report, 1) // the pages take turns
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
	tap.serve(page("rebound"))
	file := filepath.Join(t.TempDir(), "page.html")
	if err := os.WriteFile(file, page("file"), 0o600); err != nil {
		t.Fatal(err)
	}

	a := attackResult{heard: map[string]string{}, rebound: "evil.test:" + port}
	at := func(host string) string { return strings.Replace(hostile.URL, "127.0.0.1", host, 1) }
	a.origins = []string{at("127.0.0.1"), at("localhost"), at("evil.test"), "null", "http://" + a.rebound}
	b := startBrowser(t)
	defer b.close(t)
	for _, place := range []struct{ name, url string }{
		{"rebound", "http://" + a.rebound + hostilePath}, // first: the browser has no connection to that name yet
		{"address", at("127.0.0.1") + "/page/address"},
		{"localhost", at("localhost") + "/page/localhost"},
		{"evil", at("evil.test") + "/page/evil"},
		{"file", "file://" + file},
		{"frame", at("127.0.0.1") + "/sandboxed"}, // of the origin null
	} {
		b.open(t, place.url)
		select {
		case rep := <-reports:
			if rep.Page != place.name || len(rep.Made) < 100 {
				t.Fatalf("page %s reports %+v", place.name, rep)
			}
			a.made = append(a.made, rep.Made...)
			maps.Copy(a.heard, rep.Heard)
		case <-time.After(patience * time.Minute):
			t.Fatalf("page %s does not report; the browser says:\n%s", place.name, b.log)
		}
	}
	// As if somebody followed a link there.
	b.open(t, "http://"+a.rebound+"/api/v1/health?try=visit")
	unanswered := append(slices.Clone(a.made), "visit")
	defer func() {
		if t.Failed() {
			t.Logf("not answered: %q", unanswered)
		}
	}()
	until(t, "all attempts to be answered", func() bool {
		a.exchanges = tap.exchanges(t)
		answered := map[string]bool{}
		for _, x := range a.exchanges {
			answered[x.URL.Query().Get("try")] = true
		}
		unanswered = slices.DeleteFunc(unanswered, func(attempt string) bool { return answered[attempt] })
		return len(unanswered) == 0
	})
	return a
}

// browser is Chromium without a window, and with less protection of local servers than it has by default.
type browser struct {
	cmd     *exec.Cmd
	profile string
	debug   string // address of its DevTools
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
		// Other browsers let a page of anywhere reach this machine's servers.
		"--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests",
		"--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-breakpad", "about:blank")
	b.cmd.Stdout, b.cmd.Stderr = b.log, b.log
	b.cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + b.profile, "TMPDIR=" + b.profile}
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // its many processes end with it
	if err := b.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, "the browser", func() bool {
		text, err := os.ReadFile(filepath.Join(b.profile, "DevToolsActivePort"))
		port, _, whole := strings.Cut(string(text), "\n")
		b.debug = "127.0.0.1:" + port
		return err == nil && whole
	})
	return b
}

// open loads a page in a tab of its own.
func (b *browser) open(t *testing.T, page string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodPut, "http://"+b.debug+"/json/new?"+url.QueryEscape(page), nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatalf("%v; the browser says:\n%s", err, b.log)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Fatalf("open %s: %s", page, res.Status)
	}
}

func (b *browser) close(t *testing.T) {
	syscall.Kill(-b.cmd.Process.Pid, syscall.SIGKILL)
	b.cmd.Wait()
	until(t, "the browser's processes to end", func() bool { return len(processes(b.profile, "chromium")) == 0 })
}

// hostilePath is where a recordingProxy answers with the hostile page.
const hostilePath = "/page"

// recordingProxy passes bytes between a browser and a server and remembers them. It stands in for an attacker's
// name server, too, which is asked for the page first and then gives the server's address: a request for the page
// is answered here, and everything else goes on.
type recordingProxy struct {
	address, server string
	listener        net.Listener
	mu              sync.Mutex
	connections     []*connection
}

// connection is what went over one, so far.
type connection struct{ requests, answers bytes.Buffer }

// exchange is a request and its answer.
type exchange struct {
	*http.Request
	status int
	body   []byte
}

func newRecordingProxy(t *testing.T, server string) *recordingProxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return &recordingProxy{address: l.Addr().String(), server: server, listener: l}
}

func (w *recordingProxy) serve(page []byte) {
	go func() {
		for {
			c, err := w.listener.Accept()
			if err != nil {
				return
			}
			go w.pass(c, page)
		}
	}()
}

func (w *recordingProxy) pass(client net.Conn, page []byte) {
	defer client.Close()
	in := bufio.NewReader(client)
	if line, _ := in.Peek(len("GET " + hostilePath)); string(line) == "GET "+hostilePath {
		fmt.Fprintf(client, "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(page), page)
		return
	}
	server, err := net.Dial("tcp", w.server)
	if err != nil {
		return
	}
	defer server.Close()
	c := &connection{}
	w.mu.Lock()
	w.connections = append(w.connections, c)
	w.mu.Unlock()
	go func() {
		io.Copy(io.MultiWriter(w.recorder(&c.requests), server), in)
		server.(*net.TCPConn).CloseWrite()
	}()
	io.Copy(io.MultiWriter(w.recorder(&c.answers), client), server)
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func (w *recordingProxy) recorder(b *bytes.Buffer) io.Writer {
	return writerFunc(func(p []byte) (int, error) {
		w.mu.Lock()
		defer w.mu.Unlock()
		return b.Write(p)
	})
}

// exchanges reads what went by, as far as it is complete.
func (w *recordingProxy) exchanges(t *testing.T) (all []exchange) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.connections {
		requests := bufio.NewReader(bytes.NewReader(c.requests.Bytes()))
		answers := bufio.NewReader(bytes.NewReader(c.answers.Bytes()))
		for {
			req, err := http.ReadRequest(requests)
			if err != nil {
				break
			}
			io.Copy(io.Discard, req.Body)
			res, err := http.ReadResponse(answers, req)
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
