package tlscert

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

var discard = slog.New(slog.DiscardHandler)

func TestProtocols(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "server CA")
	address := serve(t, open(t, newFiles(t, ca.issue(t, nil)).Options))
	for _, tc := range []struct {
		name     string
		client   *tls.Config
		want     string
		wantFail bool
	}{
		{name: "default", client: &tls.Config{}, want: "HTTP/2.0"},
		{name: "HTTP/1.1", client: &tls.Config{NextProtos: []string{"http/1.1"}}, want: "HTTP/1.1"},
		{name: "TLS 1.2", client: &tls.Config{MaxVersion: tls.VersionTLS12}, want: "HTTP/2.0"},
		{name: "TLS 1.1", client: &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, wantFail: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.client.RootCAs = ca.pool()
			_, proto, err := get(address, tc.client)
			if proto != tc.want || (err != nil) != tc.wantFail {
				t.Errorf("got protocol %q, error %v; want %q", proto, err, tc.want)
			}
			if tc.wantFail && !strings.Contains(err.Error(), "protocol version") {
				t.Errorf("got error %v, want one about the protocol version", err)
			}
		})
	}
}

func TestClientCertificates(t *testing.T) {
	t.Parallel()
	serverCA, firstCA, secondCA, otherCA := newAuthority(t, "server CA"), newAuthority(t, "first"), newAuthority(t, "second"), newAuthority(t, "other")
	f := newFiles(t, serverCA.issue(t, nil))
	f.withClientCA(t, firstCA, secondCA)
	s := open(t, f.Options)
	if !s.Status(time.Now()).ClientCertificates {
		t.Error("status: ClientCertificates is false, want true")
	}
	address := serve(t, s)
	for _, tc := range []struct {
		name string
		cert *issued
		ok   bool
	}{
		{"no certificate", nil, false},
		{"from the first CA", new(firstCA.issue(t, nil)), true},
		{"from the second CA", new(secondCA.issue(t, nil)), true},
		{"from another CA", new(otherCA.issue(t, nil)), false},
		{"from the server's CA", new(serverCA.issue(t, nil)), false},
		{"expired", new(firstCA.issue(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })), false},
		{"for servers only", new(firstCA.issue(t, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		})), false},
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(tc.name+", "+tls.VersionName(version), func(t *testing.T) {
				client := &tls.Config{RootCAs: serverCA.pool(), MinVersion: version, MaxVersion: version}
				if tc.cert != nil {
					// From Certificates, the client would send none that the server does not accept.
					client.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
						return new(tc.cert.pair(t)), nil
					}
				}
				if _, _, err := get(address, client); (err == nil) != tc.ok {
					t.Errorf("got error %v, want accepted: %t", err, tc.ok)
				}
			})
		}
	}
}

// With client CAs, sessions are not resumed, because a session may have begun when other CAs were trusted.
func TestClientCAsDisableResumption(t *testing.T) {
	t.Parallel()
	serverCA, oldCA, newCA := newAuthority(t, "server CA"), newAuthority(t, "old"), newAuthority(t, "new")
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			t.Parallel()
			clientWith := func(pair issued) *tls.Config {
				return &tls.Config{
					RootCAs: serverCA.pool(), MinVersion: version, MaxVersion: version,
					ClientSessionCache: tls.NewLRUClientSessionCache(0),
					GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
						return new(pair.pair(t)), nil
					},
				}
			}
			oldClient, newClient := clientWith(oldCA.issue(t, nil)), clientWith(newCA.issue(t, nil))

			// Without client CAs, sessions are resumed, even after the certificate has changed. This shows that the
			// clients are able to resume.
			f := newFiles(t, serverCA.issue(t, nil))
			s := open(t, f.Options)
			address := serve(t, s)
			servedSerial(t, address, oldClient)
			f.withClientCA(t, oldCA)
			if state, _, err := get(address, oldClient); err != nil || !state.DidResume {
				t.Fatalf("without client CAs: resumed: %t, error %v", state.DidResume, err)
			}

			s = open(t, f.Options)
			address = serve(t, s)
			oldClient.ClientSessionCache = tls.NewLRUClientSessionCache(0)
			for range 2 {
				if state, _, err := get(address, oldClient); err != nil || state.DidResume {
					t.Fatalf("resumed: %t, error %v; want a full handshake", state.DidResume, err)
				}
			}
			f.withClientCA(t, newCA)
			poll(s)
			if _, _, err := get(address, oldClient); err == nil {
				t.Error("a client with a certificate from the removed CA was accepted")
			}
			if _, _, err := get(address, newClient); err != nil {
				t.Errorf("a client with a certificate from the new CA was refused: %v", err)
			}
		})
	}
}

func TestStatus(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "CA")
	now := time.Now().Truncate(time.Second)
	const day = 24 * time.Hour
	expiry := now.Add(90 * day)
	s := open(t, newFiles(t, ca.issue(t, func(c *x509.Certificate) { c.NotBefore, c.NotAfter = now, expiry })).Options)

	if st := s.Status(now); st.Source != "files" || !st.NotAfter.Equal(expiry) || st.ClientCertificates ||
		!slices.Equal(st.Names, []string{"localhost", "127.0.0.1"}) {
		t.Errorf("got status %+v, want files for localhost and 127.0.0.1 until %s, without client certificates", st, expiry)
	}
	for _, tc := range []struct {
		at   time.Time
		want string
	}{
		{now, ""},
		{now.Add(-time.Second), "is not valid before"},
		{expiry.Add(-14 * day), ""},
		{expiry.Add(-14*day + time.Second), "in 13 days: replace it"},
		{expiry.Add(-2 * day), "in 2 days"},
		{expiry.Add(-2*day + time.Second), "in 47 hours"},
		{expiry.Add(-2 * time.Hour), "in 2 hours:"},
		{expiry.Add(-time.Hour), "in 1 hour:"},
		{expiry, "in less than 1 hour"},
		{expiry.Add(time.Second), "expired at " + expiry.UTC().Format(time.RFC3339)},
	} {
		switch warnings := s.Status(tc.at).Warnings; {
		case tc.want == "" && len(warnings) == 0:
		case tc.want != "" && len(warnings) == 1 && strings.Contains(warnings[0], tc.want) && strings.Contains(warnings[0], "localhost"):
		default:
			t.Errorf("at %s: got warnings %q, want %q", tc.at, warnings, tc.want)
		}
	}
}

func TestWarnings(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t, "CA")
	good := ca.issue(t, nil)
	for _, tc := range []struct {
		name  string
		pair  issued
		setup func(t *testing.T, f *files)
		want  string
	}{
		{name: "no problem", pair: good},
		{name: "key that every user can access", pair: good, setup: func(t *testing.T, f *files) {
			if err := os.Chmod(f.KeyFile, 0o644); err != nil {
				t.Fatal(err)
			}
		}, want: "every user of this host can access the TLS key"},
		{name: "key that its group can access", pair: good, setup: func(t *testing.T, f *files) {
			if err := os.Chmod(f.KeyFile, 0o640); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "no host name", pair: ca.issue(t, func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = nil, nil }),
			want: "has no host name"},
		{name: "lifetime of a day", pair: ca.issue(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(24 * time.Hour) })},
		{name: "lifetime of a day, expires soon", pair: ca.issue(t, func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-19*time.Hour), time.Now().Add(5*time.Hour)
		}), want: "in 4 hours"},
		{name: "client CA that expires soon", pair: good, setup: func(t *testing.T, f *files) {
			f.withClientCA(t, ca, newAuthorityUntil(t, "old CA", time.Now().Add(7*24*time.Hour)))
		}, want: `client CA "CN=old CA"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			f := newFiles(t, tc.pair)
			if tc.setup != nil {
				tc.setup(t, &f)
			}
			var log bytes.Buffer
			f.Log = slog.New(slog.NewTextHandler(&log, nil))
			s := open(t, f.Options)
			warnings := s.Status(time.Now()).Warnings
			if tc.want == "" && (len(warnings) > 0 || log.Len() > 0) {
				t.Errorf("got warnings %q, log %q; want none", warnings, &log)
			}
			if tc.want != "" && (len(warnings) != 1 || !strings.Contains(warnings[0], tc.want)) {
				t.Errorf("got warnings %q, want one with %q", warnings, tc.want)
			}
			if tc.want != "" && !strings.Contains(log.String(), "TLS needs attention") {
				t.Errorf("got log %q, want the warning in it", &log)
			}
		})
	}
}

func TestKeyModeIsPolled(t *testing.T) {
	t.Parallel()
	f := newFiles(t, newAuthority(t, "CA").issue(t, nil))
	s := open(t, f.Options)
	for _, mode := range []os.FileMode{0o604, 0o600} {
		if err := os.Chmod(f.KeyFile, mode); err != nil {
			t.Fatal(err)
		}
		poll(s)
		if got := len(s.Status(time.Now()).Warnings) > 0; got != (mode != 0o600) {
			t.Errorf("mode %s: there is a warning: %t, want %t", mode, got, !got)
		}
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	f := newFiles(t, newAuthority(t, "CA").issue(t, nil))
	acme := func(domains ...string) ACME {
		return ACME{Domains: domains, CacheDir: filepath.Join(t.TempDir(), "acme")}
	}
	shared := t.TempDir()
	if err := os.Chmod(shared, 0o750); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		o     Options
		class error
		want  string
	}{
		{"no source", Options{}, errdefs.ErrInvalidArgument, "either a certificate file and a key file, or ACME domains"},
		{"no key", Options{CertFile: f.CertFile}, errdefs.ErrInvalidArgument, "a certificate file and a key file"},
		{"no certificate", Options{KeyFile: f.KeyFile}, errdefs.ErrInvalidArgument, "a certificate file and a key file"},
		{"both sources", Options{CertFile: f.CertFile, KeyFile: f.KeyFile, ACME: acme("a.example.org")}, errdefs.ErrInvalidArgument, "or ACME domains"},
		{"name without a dot", Options{ACME: acme("localhost")}, errdefs.ErrInvalidArgument, `"localhost": it has no dot`},
		{"IP address", Options{ACME: acme("192.0.2.1")}, errdefs.ErrInvalidArgument, "it is an IP address"},
		{"wildcard", Options{ACME: acme("*.example.org")}, errdefs.ErrInvalidArgument, "full host name"},
		{"cache that other users can access", Options{ACME: ACME{Domains: []string{"a.example.org"}, CacheDir: shared}}, errdefs.ErrFailedPrecondition, "chmod 700"},
		{"missing directory CA file", Options{ACME: ACME{Domains: []string{"a.example.org"}, CacheDir: filepath.Join(t.TempDir(), "acme"), DirectoryCAFile: "/nowhere/ca.pem"}},
			errdefs.ErrFailedPrecondition, "ACME directory CA file /nowhere/ca.pem: it cannot be read (no such file or directory)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			tc.o.Log = discard
			_, err := Open(tc.o)
			if !errors.Is(err, tc.class) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want %q", err, tc.want)
			}
		})
	}
}

// crypto/tls loads a key that is too weak, but then every handshake fails.
func TestWeakKeyIsRefused(t *testing.T) {
	t.Parallel()
	key := weakKey(t)
	f := newFiles(t, issued{
		newAuthority(t, "CA").sign(t, &key.PublicKey, nil),
		encode("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key)),
	})
	if _, err := Open(f.Options); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "too weak") {
		t.Errorf("got error %v, want one about a weak key", err)
	}
}

// weakKey returns an RSA key of 512 bits. crypto/rsa does not generate such keys.
func weakKey(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	e := big.NewInt(65537)
	for {
		p, err := rand.Prime(rand.Reader, 256)
		if err != nil {
			t.Fatal(err)
		}
		q, err := rand.Prime(rand.Reader, 256)
		if err != nil {
			t.Fatal(err)
		}
		one := big.NewInt(1)
		phi := new(big.Int).Mul(new(big.Int).Sub(p, one), new(big.Int).Sub(q, one))
		d := new(big.Int).ModInverse(e, phi)
		if d == nil {
			continue
		}
		key := &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: new(big.Int).Mul(p, q), E: int(e.Int64())}, D: d, Primes: []*big.Int{p, q}}
		key.Precompute()
		return key
	}
}
