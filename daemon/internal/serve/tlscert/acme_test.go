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
	// unreachableURL is an address that refuses connections.
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

// options returns Options for certificates from p.
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
		t.Errorf("before a certificate was issued: got status %+v, want no certificates and no warnings", st)
	}
	if _, _, err := get(address, &tls.Config{RootCAs: p.roots, ServerName: host}); err == nil {
		t.Error("a handshake succeeded before a certificate was issued")
	}

	run(t, s)
	eventually(t, "both certificates to be issued", func() bool { return len(s.Status(time.Now()).Names) == 2 })
	for _, name := range []string{host, second} {
		_, proto, err := get(address, &tls.Config{RootCAs: p.roots, ServerName: name})
		if err != nil || proto != "HTTP/2.0" {
			t.Errorf("%s: got protocol %q, error %v; want HTTP/2.0", name, proto, err)
		}
	}
	st := s.Status(time.Now())
	if !slices.Equal(st.Names, []string{host, second}) || len(st.Warnings) > 0 || st.NotAfter.Before(time.Now().Add(80*24*time.Hour)) {
		t.Errorf("got status %+v, want both names, an expiry in 90 days and no warnings", st)
	}

	t.Run("handshakes for other names order nothing", func(t *testing.T) {
		before := listTree(t, o.ACME.CacheDir)
		for _, name := range []string{"other.example.org", "", "../msb.example.org"} {
			get(address, &tls.Config{InsecureSkipVerify: true, ServerName: name})
			get(address, &tls.Config{InsecureSkipVerify: true, ServerName: name, NextProtos: []string{acme.ALPNProto}})
		}
		if after := listTree(t, o.ACME.CacheDir); !slices.Equal(before, after) {
			t.Errorf("files changed: got %q, want %q", after, before)
		}
	})
	t.Run("files are private", func(t *testing.T) {
		for _, entry := range listTree(t, o.ACME.CacheDir) {
			if !strings.HasPrefix(entry, "drwx------ ") && !strings.HasPrefix(entry, "-rw------- ") {
				t.Errorf("got %q, want a file that only its owner can access", entry)
			}
		}
	})
	t.Run("restart orders nothing", func(t *testing.T) {
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

// listTree returns the mode and the path of each file below dir.
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

// If clients must present a certificate, the CA can still validate the domain, and certificates are renewed.
func TestACMEWithClientCertificates(t *testing.T) {
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
	serialNumber := func() string { // "" if the request fails
		state, _, err := get(ln.Addr().String(), client)
		if err != nil {
			return ""
		}
		return state.PeerCertificates[0].SerialNumber.String()
	}
	var first string
	eventually(t, "a certificate to be served", func() bool { first = serialNumber(); return first != "" })
	if _, _, err := get(ln.Addr().String(), &tls.Config{InsecureSkipVerify: true, ServerName: host}); err == nil {
		t.Error("a client without a certificate was accepted")
	}
	eventually(t, "the certificate to be renewed", func() bool { n := serialNumber(); return n != "" && n != first })
}

// A connection for a challenge needs no client certificate, but cannot be used for requests.
func TestChallengeConnectionsCannotSendRequests(t *testing.T) {
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
		// autocert stores the certificate of a pending challenge in this form.
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
			t.Fatalf("handshake for the challenge: %v", err)
		}
		defer conn.Close()
		io.WriteString(conn, "GET / HTTP/1.1\r\nHost: "+host+"\r\n\r\n")
		if response, _ := io.ReadAll(conn); len(response) > 0 {
			t.Errorf("got response %q, want none", response)
		}
		if conn, err := dial(foreign); err == nil {
			conn.Close()
			t.Error("the handshake succeeded for the challenge of a domain that is not configured")
		}
	}
}

// If an order fails, a warning gives the reason that the CA reported.
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
		}, []string{`the ACME server says "Could not resolve URL`, host, "check that it can reach this gateway at port 443"}},
		{"name that resolves to another server", func(t *testing.T, _ net.Addr) Options {
			return startPebble(t, untrusted.Listener.Addr(), time.Hour, host).options(t, host)
		}, []string{"the ACME server says", "check that it can reach this gateway at port 443"}},
		{"unreachable ACME server", func(t *testing.T, _ net.Addr) Options {
			return pebble{directory: unreachableURL}.options(t, host)
		}, []string{"reach the ACME server", "connection refused"}},
		{"ACME server with a certificate from an unknown CA", func(t *testing.T, _ net.Addr) Options {
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
			eventually(t, "a warning", func() bool {
				warnings = s.Status(time.Now()).Warnings
				return len(warnings) > 0
			})
			for _, want := range append(tc.want, "no new TLS certificate for "+host, "next attempt is at") {
				if !strings.Contains(warnings[0], want) {
					t.Errorf("got warning %q, want %q in it", warnings[0], want)
				}
			}
		})
	}
}

// Retries slow down, because CAs allow only a few failures per hour.
func TestRetryDelayOfFailedOrders(t *testing.T) {
	t.Parallel()
	s := open(t, pebble{directory: unreachableURL}.options(t, host))
	order := s.acme.orders[0]
	for _, want := range []time.Duration{2, 4, 8, 16, 32, 60, 60} {
		order.next = time.Time{}
		s.acme.fetch(order)
		if order.wait != want*time.Minute {
			t.Errorf("delay before the next attempt is %s, want %s", order.wait, want*time.Minute)
		}
		err := order.err
		s.acme.fetch(order)
		if order.err != err {
			t.Error("fetch ordered again without a delay")
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
			`the ACME server says "no route": check that it can reach this gateway at port 443 of that name`},
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

func TestCacheWriteErrorsAreLogged(t *testing.T) {
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
		t.Error("Put into a cache that is not a directory: got no error")
	}
	if !strings.Contains(log.String(), "could not store ACME data") {
		t.Errorf("got log %q, want the error in it", &log)
	}
}
