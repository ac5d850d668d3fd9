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

// maxFile is the largest file, in bytes, that is read. No chain or list of CAs needs as much.
const maxFile = 1 << 20

// inputs are the files and certificates from which a state is made, as they were read at one moment.
type inputs struct {
	cert, key, clientCA file
	issued              []tls.Certificate // the certificates that were issued through ACME
}

// file has the contents of a file, or the error of reading it. The path is empty if the file is not configured.
type file struct {
	what, path string
	data       []byte
	mode       fs.FileMode
	err        error
}

// read reads the files, and takes the certificates that were fetched through ACME.
func (s *Source) read() inputs {
	in := inputs{
		cert:     readFile("TLS certificate", s.opts.CertFile),
		key:      readFile("TLS key", s.opts.KeyFile),
		clientCA: readFile("client CA file", s.opts.ClientCAFile),
	}
	if s.acme != nil {
		in.issued = s.acme.certificates()
	}
	return in
}

// readFile reads a file. what is the name of the file in error messages.
func readFile(what, path string) file {
	f := file{what: what, path: path}
	if path == "" {
		return f
	}
	f.err = func() error {
		// If path is a FIFO, O_NONBLOCK keeps the open from blocking.
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

// sum returns a hash that differs if the inputs differ.
func (in inputs) sum() (sum [sha256.Size]byte) {
	h := sha256.New()
	for _, f := range []file{in.cert, in.key, in.clientCA} {
		fmt.Fprintf(h, "%d %s %v ", len(f.data), f.mode, f.err)
		h.Write(f.data)
	}
	for _, c := range in.issued {
		h.Write(c.Leaf.Raw)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// state checks in and returns its state. With ACME, the state has no certificates until one is issued.
func (in inputs) state() (*state, error) {
	st := &state{
		config:  &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: protocols, Certificates: in.issued},
		keyMode: in.key.mode,
	}
	if in.cert.path != "" {
		pair, err := in.keyPair()
		if err != nil {
			return nil, err
		}
		st.config.Certificates = []tls.Certificate{pair}
	}
	if in.clientCA.path != "" {
		var err error
		if st.clientCAs, err = in.clientCA.certificates(); err != nil {
			return nil, err
		}
		st.config.ClientAuth = tls.RequireAndVerifyClientCert
		st.config.ClientCAs = pool(st.clientCAs)
		// A session that was begun with an earlier set of client CAs could be resumed without a check against the
		// current ones.
		st.config.SessionTicketsDisabled = true
	}
	return st, nil
}

// keyPair returns the certificate chain with its key.
func (in inputs) keyPair() (tls.Certificate, error) {
	chain, err := in.cert.certificates()
	if err != nil {
		return tls.Certificate{}, err
	}
	if in.key.err != nil {
		return tls.Certificate{}, in.key.readError()
	}
	if bytes.Contains(in.key.data, []byte("ENCRYPTED")) {
		return tls.Certificate{}, in.key.errorf("it is encrypted: use a key without a passphrase ('openssl pkey' can remove the passphrase)")
	}
	// crypto/rsa refuses to sign with a shorter key, so every handshake would fail.
	if k, ok := chain[0].PublicKey.(*rsa.PublicKey); ok && k.N.BitLen() < 1024 {
		return tls.Certificate{}, in.cert.errorf("an RSA key of %d bits is too weak: use a key of 2048 bits or more", k.N.BitLen())
	}
	pair, err := tls.X509KeyPair(in.cert.data, in.key.data)
	if err != nil {
		return tls.Certificate{}, in.cert.errorf("it does not work with the key %s (%s): use the certificate's own key, "+
			"and put the certificate before those of its issuers", in.key.path, err)
	}
	return pair, nil
}

// certificates parses the certificates in f. It fails if there is none or if a PEM block is damaged. The readers of the
// standard library would skip damaged blocks.
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
			return nil, f.errorf("certificate %d in it is damaged (%s): replace the file", len(out)+1, err)
		}
		out = append(out, c)
	}
	if blocks != bytes.Count(f.data, []byte("-----BEGIN ")) {
		return nil, f.errorf("a PEM block in it is damaged or cut off: replace the file")
	}
	if len(out) == 0 {
		return nil, f.errorf("it contains no certificate: use a PEM file, which has a line -----BEGIN CERTIFICATE-----")
	}
	return out, nil
}

// readError returns the error of a file that could not be read.
func (f file) readError() error {
	cause := f.err
	if inPath := (*fs.PathError)(nil); errors.As(cause, &inPath) {
		cause = inPath.Err // errorf adds the path
	}
	return f.errorf("it cannot be read (%s): use a PEM file that the user who runs msbd can read", cause)
}

// errorf returns an errdefs.ErrFailedPrecondition whose text begins with the name and the path of the file.
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
