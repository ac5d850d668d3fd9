package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// authority signs certificates for a test.
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

// leaf is a certificate for loopback addresses, or for a client, in PEM.
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

// replace puts a file in another's place in one step, as tools that renew certificates do.
func replace(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// tlsServer is a server with TLS on all addresses, with the files ca.pem, cert.pem and key.pem in dir, and
// further settings.
func tlsServer(t *testing.T, dir string, settings ...string) (s *server, a *authority) {
	t.Helper()
	a = newAuthority(t)
	cert, key := a.leaf(t)
	replace(t, filepath.Join(dir, "cert.pem"), cert)
	replace(t, filepath.Join(dir, "key.pem"), key)
	replace(t, filepath.Join(dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
	settings = append(settings, fmt.Sprintf("tls_cert = '%s/cert.pem'", dir), fmt.Sprintf("tls_key = '%s/key.pem'", dir))
	config := filepath.Join(dir, "msbd.toml")
	replace(t, config, []byte(strings.Join(settings, "\n")))
	// In plaintext it would not listen there.
	s = testServer(t, "--config", config, "--host", "0.0.0.0")
	_, port, err := net.SplitHostPort(s.address)
	if err != nil {
		t.Fatal(err)
	}
	s.address = "127.0.0.1:" + port
	return s, a
}

// curl makes the guide's kind of request over HTTPS.
func (s *server) curl(dir, key string, flags ...string) (string, error) {
	script := `curl -sS --cacert ca.pem "$@" https://` + s.address + `/api/v1/rpc -H "Content-Type: application/json" \
  -H "Authorization: Bearer $MSB_API_KEY" -d '{"jsonrpc": "2.0", "method": "sandbox.metrics.get", "id": "1"}'`
	cmd := exec.Command("bash", append([]string{"-c", script, "curl"}, flags...)...)
	cmd.Dir, cmd.Env = dir, append(s.env(), "MSB_API_KEY="+key)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestTLS(t *testing.T) {
	parallel(t)
	dir := t.TempDir()
	s, a := tlsServer(t, dir)
	key := s.newKey(t)
	if out, err := s.curl(dir, key); err != nil || !strings.Contains(out, `"result"`) {
		t.Errorf("curl: %v: %s", err, out)
	}
	if out, err := s.curl(dir, "msb_v2.public.nonsense"); err != nil || !strings.Contains(out, "-32002") {
		t.Errorf("curl with a bad key: %v: %s", err, out)
	}
	if out, err := s.curl(dir, key, "--tls-max", "1.1", "--ciphers", "DEFAULT@SECLEVEL=0"); err == nil {
		t.Errorf("TLS 1.1: %s", out)
	}
	if out, err := s.curl(dir, key, "--cacert", "/etc/ssl/certs/ca-certificates.crt"); err == nil {
		t.Errorf("without the authority: %s", out)
	}
	// Who speaks plaintext gets no answer to what was asked.
	if res, err := http.Get("http://" + s.address + "/api/v1/health"); err == nil {
		res.Body.Close()
		if res.StatusCode == http.StatusOK {
			t.Error("plaintext is answered")
		}
	}
	if out := s.mustMSB(t, "server", "status"); !strings.Contains(out, "https://") || !strings.Contains(out, "msb.test") {
		t.Errorf("status: %s", out)
	}

	// A renewed certificate is taken while a connection goes on.
	serial := func() int64 {
		c, err := tls.Dial("tcp", s.address, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	if got := serial(); got != a.serial {
		t.Fatalf("certificate %d is served, want %d", got, a.serial)
	}
	cert, private := a.leaf(t)
	was := serial()
	replace(t, filepath.Join(dir, "cert.pem"), cert)
	// Between the two files, and with a broken one, the pair from before stays.
	if got := serial(); got != was {
		t.Errorf("half a pair was taken: %d", got)
	}
	replace(t, filepath.Join(dir, "key.pem"), private)
	until(t, "the renewed certificate", func() bool { return serial() == a.serial })
	replace(t, filepath.Join(dir, "cert.pem"), []byte("nonsense"))
	until(t, "a warning", func() bool {
		st, err := s.admin(t).Status(t.Context())
		return err == nil && strings.Contains(strings.Join(st.GetWarnings(), "\n"), "cert.pem")
	})
	if out, err := s.curl(dir, key); err != nil || !strings.Contains(out, `"result"`) {
		t.Errorf("curl, with a broken file: %v: %s", err, out)
	}
	cert, private = a.leaf(t)
	replace(t, filepath.Join(dir, "key.pem"), private)
	replace(t, filepath.Join(dir, "cert.pem"), cert)
	until(t, "the next certificate", func() bool { return serial() == a.serial })
}

func TestTLSWithClientCertificates(t *testing.T) {
	parallel(t)
	dir := t.TempDir()
	s, a := tlsServer(t, dir, fmt.Sprintf("tls_client_ca = '%s/ca.pem'", dir))
	key := s.newKey(t)
	if out, err := s.curl(dir, key); err == nil {
		t.Errorf("without a certificate: %s", out)
	}
	for name, issuer := range map[string]*authority{"client": a, "stranger": newAuthority(t)} {
		cert, private := issuer.leaf(t)
		replace(t, filepath.Join(dir, name+".pem"), append(cert, private...))
	}
	if out, err := s.curl(dir, key, "--cert", "stranger.pem"); err == nil {
		t.Errorf("with a stranger's certificate: %s", out)
	}
	if out, err := s.curl(dir, key, "--cert", "client.pem"); err != nil || !strings.Contains(out, `"result"`) {
		t.Errorf("with a certificate: %v: %s", err, out)
	}
	// It is no key.
	if out, err := s.curl(dir, "none", "--cert", "client.pem"); err != nil || !strings.Contains(out, "-32002") {
		t.Errorf("with a certificate and no key: %v: %s", err, out)
	}
}
