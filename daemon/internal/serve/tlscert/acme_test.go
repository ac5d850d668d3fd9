package tlscert

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/acme"
)

const (
	host = "msb.example.org"
	// unreachableURL refuses connections.
	unreachableURL = "https://127.0.0.3:1"
)

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

func (p pebble) options(t *testing.T, domains ...string) Options {
	t.Helper()
	return Options{Log: discard, ACME: ACME{
		Domains: domains, Email: "admin@example.org",
		DirectoryURL: p.directory, DirectoryCAFile: p.serverCA,
		CacheDir: filepath.Join(t.TempDir(), "acme"),
	}}
}

func TestACME(t *testing.T) {
	t.Parallel()
	const second = "xn--mnchen-3ya.example.org"
	ln := listen(t)
	p := startPebble(t, ln.Addr(), 90*24*time.Hour, host, second)
	o := p.options(t, host, "München.Example.org.", host)
	s := open(t, o)
	address := ln.Addr().String()
	serveOn(t, s, ln)
	if st := s.Status(time.Now()); st.Source != "acme" || !st.NotAfter.IsZero() || len(st.Names) > 0 || len(st.Warnings) > 0 {
		t.Errorf("before anything was issued: %+v", st)
	}
	if _, _, err := get(address, &tls.Config{RootCAs: p.roots, ServerName: host}); err == nil {
		t.Error("a handshake succeeded before anything was issued")
	}

	run(t, s)
	eventually(t, "both certificates are issued", func() bool { return len(s.Status(time.Now()).Names) == 2 })
	for _, name := range []string{host, second} {
		_, proto, err := get(address, &tls.Config{RootCAs: p.roots, ServerName: name})
		if err != nil || proto != "HTTP/2.0" {
			t.Errorf("%s: got %q, error %v", name, proto, err)
		}
	}
	st := s.Status(time.Now())
	if !slices.Equal(st.Names, []string{host, second}) || len(st.Warnings) > 0 || st.NotAfter.Before(time.Now().Add(80*24*time.Hour)) {
		t.Errorf("got status %+v", st)
	}

	t.Run("no other name is ordered", func(t *testing.T) {
		before := listTree(t, o.ACME.CacheDir)
		for _, name := range []string{"other.example.org", "", "../msb.example.org"} {
			get(address, &tls.Config{InsecureSkipVerify: true, ServerName: name})
			get(address, &tls.Config{InsecureSkipVerify: true, ServerName: name, NextProtos: []string{acme.ALPNProto}})
		}
		if after := listTree(t, o.ACME.CacheDir); !slices.Equal(before, after) {
			t.Errorf("got files %q, had %q", after, before)
		}
	})
	t.Run("keys are private", func(t *testing.T) {
		for _, entry := range listTree(t, o.ACME.CacheDir) {
			if !strings.HasPrefix(entry, "drwx------ ") && !strings.HasPrefix(entry, "-rw------- ") {
				t.Errorf("got %q", entry)
			}
		}
	})
	t.Run("a restart orders nothing", func(t *testing.T) {
		p.stop()
		s := open(t, o)
		if got := servedSerial(t, serve(t, s), &tls.Config{RootCAs: p.roots, ServerName: second}); got == "" {
			t.Error("got no certificate")
		}
		for _, order := range s.acme.orders {
			if s.acme.fetch(order); order.err != nil {
				t.Error(order.err)
			}
		}
	})
}

// listTree lists modes and names.
func listTree(t *testing.T, dir string) (out []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		out = append(out, info.Mode().String()+" "+path)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Where clients must show a certificate, the CA still validates, and certificates are renewed.
func TestACMERenewsBehindClientCertificates(t *testing.T) {
	t.Parallel()
	ln := listen(t)
	p := startPebble(t, ln.Addr(), 12*time.Second, host)
	clientCA := newAuthority(t, "client CA")
	o := p.options(t, host)
	o.ClientCAFile = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(o.ClientCAFile, clientCA.pem(), 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, o)
	serveOn(t, s, ln)
	run(t, s)

	client := &tls.Config{RootCAs: p.roots, ServerName: host, Certificates: []tls.Certificate{clientCA.issue(t, nil).pair(t)}}
	number := func() string {
		state, _, err := get(ln.Addr().String(), client)
		if err != nil {
			return ""
		}
		return state.PeerCertificates[0].SerialNumber.String()
	}
	var first string
	eventually(t, "a certificate is served", func() bool { first = number(); return first != "" })
	if _, _, err := get(ln.Addr().String(), &tls.Config{InsecureSkipVerify: true, ServerName: host}); err == nil {
		t.Error("a client without a certificate was let in")
	}
	eventually(t, "the certificate is renewed", func() bool { n := number(); return n != "" && n != first })
}

// Whoever speaks the protocol of the challenge is asked for no certificate, and reaches nothing.
func TestChallengeConnectionsReachNothing(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "CA")
	o := pebble{directory: unreachableURL}.options(t, host)
	o.ClientCAFile = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(o.ClientCAFile, ca.pem(), 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, o)
	const foreign = "other.example.org"
	for _, name := range []string{host, foreign} {
		pair := ca.issue(t, func(c *x509.Certificate) { c.DNSNames = []string{name} })
		// As autocert keeps it while a challenge is open.
		if err := s.acme.manager.Cache.Put(context.Background(), name+"+token", append(pair.key, pair.cert...)); err != nil {
			t.Fatal(err)
		}
	}
	address := serve(t, s)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		dial := func(name string) (*tls.Conn, error) {
			return tls.Dial("tcp", address, &tls.Config{RootCAs: ca.pool(), ServerName: name, NextProtos: []string{acme.ALPNProto}, MaxVersion: version})
		}
		conn, err := dial(host)
		if err != nil {
			t.Fatalf("the challenge is not answered: %v", err)
		}
		defer conn.Close()
		io.WriteString(conn, "GET / HTTP/1.1\r\nHost: "+host+"\r\n\r\n")
		if answer, _ := io.ReadAll(conn); len(answer) > 0 {
			t.Errorf("got an answer: %q", answer)
		}
		if conn, err := dial(foreign); err == nil {
			conn.Close()
			t.Error("the challenge of a name that is not ours was looked up")
		}
	}
}

// What the CA says of a failed order is what the administrator is told.
func TestACMEFailures(t *testing.T) {
	t.Parallel()
	untrusted := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(untrusted.Close)
	untrusted.Config.ErrorLog = slog.NewLogLogger(discard.Handler(), slog.LevelDebug)
	for _, tc := range []struct {
		name    string
		options func(t *testing.T, gateway net.Addr) Options
		want    []string
	}{
		{"name that does not resolve", func(t *testing.T, gateway net.Addr) Options {
			return startPebble(t, gateway, time.Hour).options(t, host)
		}, []string{`the ACME server says "Could not resolve URL`, host, "see that it reaches this gateway at port 443"}},
		{"name of another server", func(t *testing.T, _ net.Addr) Options {
			return startPebble(t, untrusted.Listener.Addr(), time.Hour, host).options(t, host)
		}, []string{"the ACME server says", "see that it reaches this gateway at port 443"}},
		{"no server", func(t *testing.T, _ net.Addr) Options {
			return pebble{directory: unreachableURL}.options(t, host)
		}, []string{"reach the ACME server", "connection refused"}},
		{"server of an unknown CA", func(t *testing.T, _ net.Addr) Options {
			return pebble{directory: untrusted.URL}.options(t, host)
		}, []string{"reach the ACME server", "unknown authority", "--acme-directory-ca"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			ln := listen(t)
			s := open(t, tc.options(t, ln.Addr()))
			serveOn(t, s, ln)
			run(t, s)
			var warnings []string
			eventually(t, "there is a warning", func() bool {
				warnings = s.Status(time.Now()).Warnings
				return len(warnings) > 0
			})
			for _, want := range append(tc.want, "no new TLS certificate for "+host, "next attempt is at") {
				if !strings.Contains(warnings[0], want) {
					t.Errorf("got %q, want %q in it", warnings[0], want)
				}
			}
		})
	}
}

// CAs allow few failures an hour.
func TestFailedOrdersAreRepeatedSlowly(t *testing.T) {
	t.Parallel()
	s := open(t, pebble{directory: unreachableURL}.options(t, host))
	order := s.acme.orders[0]
	for _, want := range []time.Duration{2, 4, 8, 16, 32, 60, 60} {
		order.next = time.Time{}
		s.acme.fetch(order)
		if order.wait != want*time.Minute {
			t.Errorf("waits %s, want %s", order.wait, want*time.Minute)
		}
		failed := order.err
		s.acme.fetch(order)
		if order.err != failed {
			t.Error("ordered again at once")
		}
	}
}

func TestProblems(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		status     int
		body, want string
	}{
		{200, `{"status":"valid"}`, ""},
		{200, `{"status":"valid","detail":"no problem"}`, ""},
		{200, "-----BEGIN CERTIFICATE-----", ""},
		{400, `{"type":"urn:ietf:params:acme:error:badNonce","detail":"bad nonce"}`, ""},
		{429, `{"type":"urn:ietf:params:acme:error:rateLimited","detail":"too many"}`, `the ACME server says "too many"`},
		{429, "\x1b]0;\a", ""},
		{400, `{"detail":"\u001b]0;"}`, `the ACME server says "\x1b]0;"`},
		{200, `{"challenges":[{"type":"dns-01"},{"type":"tls-alpn-01","error":{"detail":"no route"}}]}`,
			`the ACME server says "no route": see that it reaches this gateway at port 443 of that name`},
	} {
		var got string
		if err := problem(tc.status, []byte(tc.body)); err != nil {
			got = err.Error()
		}
		if got != tc.want {
			t.Errorf("%d %q: got %q, want %q", tc.status, tc.body, got, tc.want)
		}
	}
}

func TestUnkeptCertificatesAreLogged(t *testing.T) {
	t.Parallel()
	o := pebble{}.options(t, host)
	var log bytes.Buffer
	o.Log = slog.New(slog.NewTextHandler(&log, nil))
	s := open(t, o)
	if err := os.Remove(o.ACME.CacheDir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(o.ACME.CacheDir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.acme.manager.Cache.Put(context.Background(), host, nil); err == nil {
		t.Error("got no error")
	}
	if !strings.Contains(log.String(), "make room in the cache directory") {
		t.Errorf("got log %q", &log)
	}
}
