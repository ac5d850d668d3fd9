package tlscert

import (
	"bytes"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxFile is more than any chain or list of CAs has.
const maxFile = 1 << 20

// material is what a state is made from, as it was found at one moment.
type material struct {
	cert, key, clientCA file
	issued              []tls.Certificate // through ACME
}

// file is what a file held, or why it could not be read. One without a path was not asked for.
type file struct {
	what, path string
	data       []byte
	mode       fs.FileMode
	err        error
}

func (s *Source) read() material {
	m := material{
		cert:     readFile("TLS certificate", s.opts.CertFile),
		key:      readFile("TLS key", s.opts.KeyFile),
		clientCA: readFile("client CA file", s.opts.ClientCAFile),
	}
	if s.acme != nil {
		m.issued = s.acme.certificates()
	}
	return m
}

func readFile(what, path string) file {
	f := file{what: what, path: path}
	if path == "" {
		return f
	}
	f.err = func() error {
		// O_NONBLOCK: a FIFO put there must not hang us.
		opened, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		defer opened.Close()
		info, err := opened.Stat()
		if err != nil {
			return err
		}
		if f.mode = info.Mode(); !f.mode.IsRegular() {
			return errors.New("not a regular file")
		}
		f.data, err = io.ReadAll(io.LimitReader(opened, maxFile+1))
		if len(f.data) > maxFile {
			return fmt.Errorf("longer than %d bytes", maxFile)
		}
		return err
	}()
	return f
}

// sum tells materials apart.
func (m material) sum() (sum [sha256.Size]byte) {
	h := sha256.New()
	for _, f := range []file{m.cert, m.key, m.clientCA} {
		fmt.Fprintf(h, "%d %s %v ", len(f.data), f.mode, f.err)
		h.Write(f.data)
	}
	for _, c := range m.issued {
		h.Write(c.Leaf.Raw)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// state checks m and makes a state of it, which has no certificates while none is issued.
func (m material) state() (*state, error) {
	st := &state{
		config:  &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: protocols, Certificates: m.issued},
		keyMode: m.key.mode,
	}
	if m.cert.path != "" {
		pair, err := m.keyPair()
		if err != nil {
			return nil, err
		}
		st.config.Certificates = []tls.Certificate{pair}
	}
	if m.clientCA.path != "" {
		var err error
		if st.clientCAs, err = m.clientCA.certificates(); err != nil {
			return nil, err
		}
		st.config.ClientAuth = tls.RequireAndVerifyClientCert
		st.config.ClientCAs = pool(st.clientCAs)
		// A resumed session would be one that earlier CAs vouched for.
		st.config.SessionTicketsDisabled = true
	}
	return st, nil
}

func (m material) keyPair() (tls.Certificate, error) {
	chain, err := m.cert.certificates()
	if err != nil {
		return tls.Certificate{}, err
	}
	if m.key.err != nil {
		return tls.Certificate{}, m.key.readError()
	}
	if bytes.Contains(m.key.data, []byte("ENCRYPTED")) {
		return tls.Certificate{}, m.key.errorf("it is encrypted: write one without a passphrase, such as with 'openssl pkey'")
	}
	// crypto/rsa does not sign with less, so that every handshake would fail.
	if k, ok := chain[0].PublicKey.(*rsa.PublicKey); ok && k.N.BitLen() < 1024 {
		return tls.Certificate{}, m.cert.errorf("an RSA key of %d bits is too weak: make one of 2048 or more", k.N.BitLen())
	}
	pair, err := tls.X509KeyPair(m.cert.data, m.key.data)
	if err != nil {
		return tls.Certificate{}, m.cert.errorf("it cannot be used with key %s (%s): give the certificate's own key, "+
			"and put the certificate before those of its issuers", m.key.path, err)
	}
	return pair, nil
}

// certificates parses every certificate of f, of which there must be one or more. The standard
// library's readers pass over blocks that they cannot read.
func (f file) certificates() ([]*x509.Certificate, error) {
	if f.err != nil {
		return nil, f.readError()
	}
	var out []*x509.Certificate
	blocks := 0
	for block, rest := pem.Decode(f.data); block != nil; block, rest = pem.Decode(rest) {
		blocks++
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, f.errorf("certificate %d of it is damaged (%s): write it anew", len(out)+1, err)
		}
		out = append(out, c)
	}
	if blocks != bytes.Count(f.data, []byte("-----BEGIN ")) {
		return nil, f.errorf("a PEM block of it is damaged or cut off: write it anew")
	}
	if len(out) == 0 {
		return nil, f.errorf("it holds no certificate: give one that is PEM, with a line -----BEGIN CERTIFICATE-----")
	}
	return out, nil
}

func (f file) readError() error {
	cause := f.err
	if inPath := (*fs.PathError)(nil); errors.As(cause, &inPath) {
		cause = inPath.Err // f has the path already
	}
	return f.errorf("it cannot be read (%s): name a file of PEM that the user who runs msbd can read", cause)
}

func (f file) errorf(format string, a ...any) error {
	return fmt.Errorf("%s %s: %s: %w", f.what, f.path, fmt.Sprintf(format, a...), errdefs.ErrFailedPrecondition)
}

func pool(certificates []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certificates {
		p.AddCert(c)
	}
	return p
}
