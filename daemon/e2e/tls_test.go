package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// authority is a certificate authority for a test.
type authority struct {
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	serial int64
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	a.cert, a.key = a.sign(t, template)
	return a
}

// sign issues a certificate with a new key. It is self-signed if the authority has no certificate yet.
func (a *authority) sign(t *testing.T, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a.serial++
	template.SerialNumber = big.NewInt(a.serial)
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// leaf issues a certificate for servers on 127.0.0.1 and for clients. It returns the certificate and its key in PEM.
func (a *authority) leaf(t *testing.T) (cert, key []byte) {
	t.Helper()
	c, k := a.sign(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "msb.test"}, DNSNames: []string{"localhost", "msb.test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// replaceFile replaces a file atomically, as tools that renew certificates do.
func replaceFile(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// tlsServer starts a server that serves TLS on all addresses. It creates the files ca.pem, cert.pem and key.pem in dir.
// settings are more lines of the configuration file.
func tlsServer(t *testing.T, dir string, settings ...string) (s *server, a *authority) {
	t.Helper()
	a = newAuthority(t)
	cert, key := a.leaf(t)
	replaceFile(t, filepath.Join(dir, "cert.pem"), cert)
	replaceFile(t, filepath.Join(dir, "key.pem"), key)
	replaceFile(t, filepath.Join(dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
	settings = append(settings, fmt.Sprintf("tls_cert = '%s/cert.pem'", dir), fmt.Sprintf("tls_key = '%s/key.pem'", dir))
	config := filepath.Join(dir, "msbd.toml")
	replaceFile(t, config, []byte(strings.Join(settings, "\n")))
	// A server without TLS would refuse to listen on all addresses.
	s = testServer(t, "--config", config, "--host", "0.0.0.0")
	_, port, err := net.SplitHostPort(s.address)
	if err != nil {
		t.Fatal(err)
	}
	s.address = "127.0.0.1:" + port
	return s, a
}

// curl sends a JSON-RPC request over HTTPS with curl, which trusts ca.pem in dir, and returns curl's output.
func (s *server) curl(dir, key string, flags ...string) (string, error) {
	script := `curl -sS --cacert ca.pem "$@" https://` + s.address + `/api/v1/rpc -H "Content-Type: application/json" \
  -H "Authorization: Bearer $MSB_API_KEY" -d '{"jsonrpc": "2.0", "method": "sandbox.metrics.get", "id": "1"}'`
	cmd := exec.Command("bash", append([]string{"-c", script, "curl"}, flags...)...)
	cmd.Dir, cmd.Env = dir, append(s.env(), "MSB_API_KEY="+key)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// exitCode returns the exit code of a command that ended with err, or -1 if err is nil or something else.
func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return -1
}

// isConnectionFailure reports whether curl ended because the connection failed, and not because of its own options or
// files. In TLS 1.3, curl learns only after the handshake that the server refuses its certificate, so the error depends
// on timing: HTTP/2 (16, 92), handshake (35), empty response (52), sending (55) or receiving (56).
func isConnectionFailure(err error) bool {
	return slices.Contains([]int{16, 35, 52, 55, 56, 92}, exitCode(err))
}

func TestTLS(t *testing.T) {
	parallel(t)
	dir := t.TempDir()
	s, a := tlsServer(t, dir)
	key := s.newKey(t)
	if out, err := s.curl(dir, key); err != nil || !strings.Contains(out, `"result"`) {
		t.Errorf("curl with a valid key: %v: %s", err, out)
	}
	if out, err := s.curl(dir, "msb_v2.public.nonsense"); err != nil || !strings.Contains(out, "-32002") {
		t.Errorf("curl with a bad key: %v: %s", err, out)
	}
	if out, err := s.curl(dir, key, "--tls-max", "1.1", "--ciphers", "DEFAULT@SECLEVEL=0"); err == nil || !strings.Contains(out, "alert protocol version") {
		t.Errorf("curl with TLS 1.1: %v: %s, want the TLS alert that the version is not supported", err, out)
	}
	if out, err := s.curl(dir, key, "--cacert", "/etc/ssl/certs/ca-certificates.crt"); exitCode(err) != 60 {
		t.Errorf("curl that does not trust the authority: %v: %s, want exit code 60", err, out)
	}
	// A plaintext request is refused.
	if res, err := http.Get("http://" + s.address + "/api/v1/health"); err == nil {
		res.Body.Close()
		if res.StatusCode == http.StatusOK {
			t.Error("a plaintext request succeeded")
		}
	}
	if out := s.mustMSB(t, "server", "status"); !strings.Contains(out, "https://") || !strings.Contains(out, "msb.test") {
		t.Errorf("status does not contain the https URL and the name in the certificate: %s", out)
	}

	// The server loads a renewed certificate without a restart.
	serial := func() int64 {
		c, err := tls.Dial("tcp", s.address, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	if got := serial(); got != a.serial {
		t.Fatalf("the server serves certificate %d, want %d", got, a.serial)
	}
	cert, private := a.leaf(t)
	before := serial()
	replaceFile(t, filepath.Join(dir, "cert.pem"), cert)
	// The server keeps the old pair while only one of the files is replaced, and while one is damaged.
	if got := serial(); got != before {
		t.Errorf("the server serves certificate %d before its key was replaced, want %d", got, before)
	}
	replaceFile(t, filepath.Join(dir, "key.pem"), private)
	until(t, "the renewed certificate", func() bool { return serial() == a.serial })
	replaceFile(t, filepath.Join(dir, "cert.pem"), []byte("nonsense"))
	until(t, "a warning about cert.pem", func() bool {
		st, err := s.admin(t).Status(t.Context())
		return err == nil && strings.Contains(strings.Join(st.GetWarnings(), "\n"), "cert.pem")
	})
	if out, err := s.curl(dir, key); err != nil || !strings.Contains(out, `"result"`) {
		t.Errorf("curl while cert.pem is damaged: %v: %s", err, out)
	}
	cert, private = a.leaf(t)
	replaceFile(t, filepath.Join(dir, "key.pem"), private)
	replaceFile(t, filepath.Join(dir, "cert.pem"), cert)
	until(t, "the next certificate", func() bool { return serial() == a.serial })
}

func TestTLSWithClientCertificates(t *testing.T) {
	parallel(t)
	dir := t.TempDir()
	s, a := tlsServer(t, dir, fmt.Sprintf("tls_client_ca = '%s/ca.pem'", dir))
	key := s.newKey(t)
	if out, err := s.curl(dir, key); !isConnectionFailure(err) {
		t.Errorf("curl without a client certificate: %v: %s, want that the connection fails", err, out)
	}
	for name, issuer := range map[string]*authority{"client": a, "stranger": newAuthority(t)} {
		cert, private := issuer.leaf(t)
		replaceFile(t, filepath.Join(dir, name+".pem"), append(cert, private...))
	}
	if out, err := s.curl(dir, key, "--cert", "stranger.pem"); !isConnectionFailure(err) {
		t.Errorf("curl with a certificate of another authority: %v: %s, want that the connection fails", err, out)
	}
	if out, err := s.curl(dir, key, "--cert", "client.pem"); err != nil || !strings.Contains(out, `"result"`) {
		t.Errorf("curl with a client certificate: %v: %s", err, out)
	}
	// A client certificate does not replace an API key.
	if out, err := s.curl(dir, "none", "--cert", "client.pem"); err != nil || !strings.Contains(out, "-32002") {
		t.Errorf("curl with a client certificate and a bad key: %v: %s, want error -32002", err, out)
	}
}
