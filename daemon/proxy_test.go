package daemon

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/mcp"
	serverpc "github.com/msbd/msbd/daemon/internal/serve/rpc"
	"github.com/msbd/msbd/daemon/internal/serve/servetest"
	"github.com/msbd/msbd/daemon/internal/serve/stream"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// nginx is a running nginx with two ways to a gateway.
type nginx struct {
	documented string // base URL of a server with the settings in docs/operations.md
	defaults   string // base URL of a server that only has proxy_pass
	client     *http.Client
}

// startNginx starts nginx in front of the gateway at addr. It ends with the test.
func startNginx(t *testing.T, addr string) nginx {
	t.Helper()
	program := filepath.Join("..", "bin", "tools", "nginx")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("nginx is missing; run 'make bin/tools/nginx': %v", err)
	}
	dir := t.TempDir()
	// The certificate of a test server is valid for 127.0.0.1, and its client trusts it.
	site := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(site.Close)
	certificate := site.TLS.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	writeFile := func(name string, data []byte) (path string) {
		t.Helper()
		path = filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	encode := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	cert := writeFile("cert.pem", encode("CERTIFICATE", certificate.Certificate[0]))
	documented, defaults := listen(t), listen(t)
	documentedServer := documentedNginx(t)
	for old, value := range map[string]string{
		"listen 443":                       "listen " + documented.Addr().String(),
		"/etc/msb/tls/fullchain.pem":       cert,
		"/etc/msb/tls/privkey.pem":         writeFile("key.pem", encode("PRIVATE KEY", key)),
		"proxy_pass http://127.0.0.1:5555": "proxy_pass http://" + addr,
	} {
		if strings.Count(documentedServer, old) != 1 {
			t.Fatalf("the nginx server in docs/operations.md does not contain %q once:\n%s", old, documentedServer)
		}
		documentedServer = strings.Replace(documentedServer, old, value, 1)
	}
	main := fmt.Sprintf(`
		daemon off; pid %[1]s/pid; error_log stderr; user root;
		events {}
		http {
			access_log off;
			client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/fastcgi;
			uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
			server { listen %[2]s; location / { proxy_pass http://%[3]s; } }
			%[4]s
		}`, dir, defaults.Addr(), addr, documentedServer)

	var output bytes.Buffer
	cmd := exec.Command(program, "-p", dir, "-c", writeFile("nginx.conf", []byte(main)))
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	// nginx takes over the sockets, so that no port is free in between and clients can connect at once.
	cmd.Env = append(os.Environ(), "NGINX=3;4;")
	for _, ln := range []*net.TCPListener{documented, defaults} {
		file, err := ln.File()
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		defer ln.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM) // nginx ends its worker first
		cmd.Wait()
		if t.Failed() {
			t.Logf("nginx:\n%s", &output)
		}
	})
	client := site.Client()
	t.Cleanup(client.CloseIdleConnections)
	return nginx{documented: "https://" + documented.Addr().String(), defaults: "http://" + defaults.Addr().String(), client: client}
}

func listen(t *testing.T) *net.TCPListener {
	t.Helper()
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// documentedNginx returns the nginx server in docs/operations.md.
func documentedNginx(t *testing.T) string {
	t.Helper()
	blocks := regexp.MustCompile("(?s)```nginx\n(.*?)```").FindAllStringSubmatch(readFile(t, filepath.Join("..", "docs", "operations.md")), -1)
	if len(blocks) != 1 {
		t.Fatalf("docs/operations.md has %d blocks for nginx, want 1", len(blocks))
	}
	return blocks[0][1]
}

// startSite starts a gateway with all endpoints, which trusts proxies on this host. Files and connections are those of streams.
func startSite(t *testing.T, streams stream.Sandboxes) (s *servetest.Site, addr string) {
	t.Helper()
	s = servetest.New(t, func(o *servetest.Setup) {
		o.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
		o.Endpoints = stream.Endpoints(streams)
	}, servetest.WithEndpoint(func(methods *serverpc.Service) (gateway.Endpoint, error) {
		h, err := mcp.New(methods, "1.2.3")
		if err != nil {
			return gateway.Endpoint{}, err
		}
		return h.Endpoint(), nil
	}))
	addr, stop := s.Listen(t)
	t.Cleanup(stop)
	return s, addr
}

// streams is a sandbox with a program that sends back what it gets, and with a file that only counts its bytes.
type streams struct {
	stream.Sandboxes
	wrote chan int // gets the size of each piece that is written to the file
}

func (*streams) Dial(context.Context, sandbox.Name, sandbox.Address) (sandbox.Conn, error) {
	near, far := net.Pipe()
	go func() {
		io.Copy(far, far)
		far.Close()
	}()
	return pipeConn{near}, nil
}

type pipeConn struct{ net.Conn }

func (pipeConn) CloseWrite() error { return nil }

func (s *streams) WriteFile(_ context.Context, _ sandbox.Name, _ sandbox.Path, _ sandbox.WriteOptions, data io.Reader) (info sandbox.FileInfo, created bool, err error) {
	for {
		n, err := data.Read(make([]byte, 64<<10))
		info.Size += int64(n)
		s.wrote <- n
		if err == io.EOF {
			return info, true, nil
		}
		if err != nil {
			return info, false, err
		}
	}
}

// post posts body with an API key. The caller closes the body of the response.
func (n nginx) post(t *testing.T, url, key, body string, change ...func(*http.Request)) *http.Response {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute) // a test that fails must end
	t.Cleanup(cancel)
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header = http.Header{
		"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}, "Authorization": {"Bearer " + key},
	}
	for _, c := range change {
		c(r)
	}
	res, err := n.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// The settings for nginx in docs/operations.md work: it waits for the longest run, and it passes on complete bodies, the
// address of the client, WebSockets, and events and uploads at once. Even with nginx's own defaults, events are passed on at
// once.
func TestNginx(t *testing.T) {
	files := &streams{wrote: make(chan int)}
	s, addr := startSite(t, files)
	n := startNginx(t, addr)
	read := func(res *http.Response) string {
		t.Helper()
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	res := n.post(t, n.documented+rpc.Path, s.Key, servetest.Request("sandbox.start", `{"sandbox":"a"}`))
	if text := read(res); res.StatusCode != http.StatusOK || !strings.Contains(text, `"result"`) {
		t.Fatalf("start: %s %s", res.Status, text)
	}

	t.Run("timeout", func(t *testing.T) {
		m := regexp.MustCompile(`proxy_read_timeout (\d+s);`).FindStringSubmatch(documentedNginx(t))
		if m == nil {
			t.Fatal("the documented settings have no proxy_read_timeout in seconds")
		}
		if timeout, err := time.ParseDuration(m[1]); err != nil || timeout <= config.Default().MaxRunTime {
			t.Errorf("proxy_read_timeout is %s, but a run may take %s", m[1], config.Default().MaxRunTime)
		}
	})

	t.Run("body", func(t *testing.T) {
		prefix, suffix := `{"jsonrpc":"2.0","id":1,"method":"sandbox.repl.run","params":{"sandbox":"a","language":"python","code":"`, `"}}`
		longest := prefix + strings.Repeat("x", rpc.MaxBody-len(prefix)-len(suffix)) + suffix
		for body, status := range map[string]int{longest: http.StatusOK, longest + " ": http.StatusRequestEntityTooLarge} {
			res := n.post(t, n.documented+rpc.Path, s.Key, body)
			if text := read(res); res.StatusCode != status || !strings.HasPrefix(text, `{"jsonrpc"`) {
				t.Errorf("%d bytes: got %s %.100s, want %d from the gateway", len(body), res.Status, text, status)
			}
		}
	})

	t.Run("upload", func(t *testing.T) {
		// The rest of the file is sent only after the first piece has arrived.
		const size = 32 << 20
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		body, file := io.Pipe()
		r, err := http.NewRequestWithContext(ctx, http.MethodPut, n.documented+"/api/v1/sandboxes/a/files?path=/f", body)
		if err != nil {
			t.Fatal(err)
		}
		r.ContentLength = size
		r.Header.Set("Authorization", "Bearer "+s.Key)
		go func() {
			defer file.Close()
			file.Write([]byte("first"))
			for received := 0; received < len("first"); {
				select {
				case n := <-files.wrote:
					received += n
				case <-ctx.Done():
					return
				}
			}
			go func() { // until the end of the test
				for {
					select {
					case <-files.wrote:
					case <-ctx.Done():
						return
					}
				}
			}()
			file.Write(make([]byte, size-len("first")))
		}()
		res, err := n.client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		if text := read(res); res.StatusCode != http.StatusCreated || !strings.Contains(text, fmt.Sprintf(`"size":%d`, size)) {
			t.Errorf("got %s %s, want 201 with the size", res.Status, text)
		}
	})

	t.Run("WebSocket", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		conn, res, err := websocket.Dial(ctx, n.documented+"/api/v1/sandboxes/a/ports/80", &websocket.DialOptions{
			HTTPClient: n.client, Subprotocols: []string{"msb", "msb.key." + s.Key},
		})
		if err != nil {
			t.Fatal(res, err)
		}
		defer conn.CloseNow()
		for _, sent := range []string{"one", "two"} {
			if err := conn.Write(ctx, websocket.MessageBinary, []byte(sent)); err != nil {
				t.Fatal(err)
			}
			if _, got, err := conn.Read(ctx); err != nil || string(got) != sent {
				t.Errorf("sent %q and got %q, error %v", sent, got, err)
			}
		}
		if err := conn.Close(websocket.StatusNormalClosure, ""); err != nil {
			t.Error(err)
		}
	})

	t.Run("client address", func(t *testing.T) {
		s.Log.Reset()
		res := n.post(t, n.documented+rpc.Path, s.Key, servetest.Request("sandbox.metrics.get", `{}`), func(r *http.Request) {
			r.Header.Set("X-Forwarded-For", "192.0.2.1, 127.0.0.1")
		})
		// nginx appends the address from which this test connects. That one and the one before it are trusted.
		if text := read(res); res.StatusCode != http.StatusOK || !strings.Contains(s.Log.String(), "192.0.2.1") {
			t.Errorf("got %s %s; want the forwarded address in the log: %s", res.Status, text, s.Log)
		}
	})

	// A run that prints nothing sends comments. They keep nginx from ending the response after its proxy_read_timeout,
	// which is 60 seconds by default.
	t.Run("silence", func(t *testing.T) {
		comments := 1
		if os.Getenv("MSB_SOAK") != "" {
			comments = 6 // 90 seconds
		}
		finish := make(chan struct{})
		s.Sandboxes.OnRun = func(context.Context) error {
			<-finish
			return nil
		}
		res := n.post(t, n.defaults+rpc.Path, s.Key, servetest.Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`),
			func(r *http.Request) { r.Header.Set("Accept", rpc.EventStream) })
		defer res.Body.Close()
		lines := bufio.NewReader(res.Body)
		for comments > 0 {
			line, err := lines.ReadString('\n')
			if err != nil {
				close(finish)
				t.Fatalf("the stream ended before the run: %v", err)
			}
			if strings.HasPrefix(line, ":") {
				comments--
			}
		}
		close(finish)
		if rest, err := io.ReadAll(lines); err != nil || !strings.Contains(string(rest), "event: result") {
			t.Errorf("the stream ends with %q, error %v; want the result", rest, err)
		}
	})

	for name, url := range map[string]string{"events": n.documented, "events with nginx's defaults": n.defaults} {
		t.Run(name, func(t *testing.T) {
			finish := make(chan struct{})
			s.Sandboxes.OnRun = func(ctx context.Context) error {
				select {
				case <-finish:
					return nil
				case <-ctx.Done():
					return context.Cause(ctx)
				}
			}
			// The run ends only after its first event has arrived.
			res := n.post(t, url+rpc.MCPPath, s.Key, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"_meta":{"progressToken":"p"},`+
				`"name":"sandbox_run_code","arguments":{"sandbox":"a","language":"python","code":"1"}}}`)
			defer res.Body.Close()
			lines := bufio.NewReader(res.Body)
			for {
				line, err := lines.ReadString('\n')
				if err != nil {
					t.Fatal(err)
				}
				if strings.Contains(line, "notifications/progress") {
					break
				}
			}
			close(finish)
			if rest, err := io.ReadAll(lines); err != nil || !strings.Contains(string(rest), "python: 1") {
				t.Errorf("the stream ends with %q, error %v; want the result", rest, err)
			}
		})
	}
}
