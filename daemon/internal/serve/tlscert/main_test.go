package tlscert

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// waitTimeout is how long tests wait for something that must happen. No test depends on the time that it takes.
const waitTimeout = 30 * time.Second

// files is a directory with the files that Options name.
type files struct{ Options }

func newFiles(t testing.TB, pair issued) files {
	t.Helper()
	dir := t.TempDir()
	f := files{Options{CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem"), Log: discard}}
	f.write(t, f.CertFile, pair.cert)
	f.write(t, f.KeyFile, pair.key)
	return f
}

func (f *files) withClientCA(t testing.TB, cas ...authority) {
	t.Helper()
	f.ClientCAFile = filepath.Join(filepath.Dir(f.CertFile), "ca.pem")
	var all []byte
	for _, ca := range cas {
		all = append(all, ca.pem()...)
	}
	f.write(t, f.ClientCAFile, all)
}

// write overwrites the file at path in place.
func (f files) write(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, o Options) *Source {
	t.Helper()
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// run runs s until the test ends.
func run(t testing.TB, s *Source) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// serve starts a server with the certificates of s, as the gateway uses them, and returns its address. The response to
// every request is the protocol of the request.
func serve(t testing.TB, s *Source) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, s, ln)
	return ln.Addr().String()
}

// serveOn is like serve but serves on an existing listener.
func serveOn(t testing.TB, s *Source, ln net.Listener) {
	t.Helper()
	server := &http.Server{
		Handler:  http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Proto) }),
		ErrorLog: slog.NewLogLogger(discard.Handler(), slog.LevelDebug),
	}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(tls.NewListener(ln, s.Config())) }()
	t.Cleanup(func() { server.Close(); <-done })
}

// get sends a request on a new connection and returns the connection's state and the body of the response. It sends a
// request, because with TLS 1.3 a client learns only after the handshake that the server refused its certificate.
func get(address string, config *tls.Config) (tls.ConnectionState, string, error) {
	transport := &http.Transport{TLSClientConfig: config.Clone(), ForceAttemptHTTP2: config.NextProtos == nil}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: waitTimeout}
	resp, err := client.Get("https://" + address)
	if err != nil {
		return tls.ConnectionState{}, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return *resp.TLS, string(body), err
}

// servedSerial returns the serial number of the certificate that the server at address uses for a new connection.
func servedSerial(t testing.TB, address string, config *tls.Config) string {
	t.Helper()
	state, _, err := get(address, config)
	if err != nil {
		t.Fatal(err)
	}
	return state.PeerCertificates[0].SerialNumber.String()
}

// eventually waits until ok returns true. what completes the sentence "waited for".
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(waitTimeout); !ok(); {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("waited %s for %s", waitTimeout, what)
		}
	}
}

// poll polls the files twice, because a change is used only when two polls find it.
func poll(s *Source) {
	s.poll(time.Now())
	s.poll(time.Now())
}
