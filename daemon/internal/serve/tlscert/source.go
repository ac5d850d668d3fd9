// Package tlscert provides the gateway's TLS certificates. They come from a certificate file and a key file, which may be
// replaced at any time, or are fetched and renewed through ACME. A handshake uses the last valid certificates. It reads no
// file and waits for no server. Only package daemon imports this package.
package tlscert

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

// Options configures a Source. Either CertFile and KeyFile or ACME.Domains must be set, but not both.
type Options struct {
	// CertFile and KeyFile are PEM files with the certificate chain, which begins with the server's own certificate,
	// and its key.
	CertFile, KeyFile string
	// ClientCAFile is a PEM file of CAs. If it is set, clients must present a certificate signed by one of them. A
	// change of the file affects only new connections.
	ClientCAFile string
	// ACME fetches and renews certificates if its Domains are set.
	ACME ACME
	Log  *slog.Logger
}

// interval is the time between two polls of the files. A change is used when two polls in a row find the same contents.
const interval = 500 * time.Millisecond

// Source provides certificates. Its methods are safe for concurrent use, but Run may be called only once.
type Source struct {
	opts Options
	acme *fetcher // nil if the certificates come from files
	live atomic.Pointer[state]

	// Only Open, and then only Run, uses these fields. seen is the hash of the inputs at the last poll. decided is the
	// hash of the inputs that were last used or rejected. logged has the warnings that are in the log.
	seen, decided [sha256.Size]byte
	logged        []string
}

// state is what handshakes and Status use. It is immutable; a change replaces it.
type state struct {
	config    *tls.Config
	clientCAs []*x509.Certificate
	keyMode   fs.FileMode
	// reloadErr is why the current files are not used. It is nil if this state comes from them.
	reloadErr error
}

// Open returns a Source with the certificates in the files, or those that an earlier run fetched. Files that cannot be
// used are an errdefs.ErrFailedPrecondition, contradictory options an errdefs.ErrInvalidArgument. An expired
// certificate is used, with a warning.
func Open(o Options) (*Source, error) {
	if files := o.CertFile != "" && o.KeyFile != ""; files == (len(o.ACME.Domains) > 0) {
		return nil, fmt.Errorf("TLS needs either a certificate file and a key file, or ACME domains: %w", errdefs.ErrInvalidArgument)
	}
	s := &Source{opts: o}
	if len(o.ACME.Domains) > 0 {
		var err error
		if s.acme, err = newFetcher(o.ACME, o.Log); err != nil {
			return nil, err
		}
	}
	in := s.read()
	st, err := in.state()
	if err != nil {
		return nil, err
	}
	s.seen = in.sum()
	s.decided = s.seen
	s.live.Store(st)
	s.logWarnings(time.Now())
	return s, nil
}

// Config returns the configuration of the gateway's listener. It supports TLS 1.2 and later, HTTP/2 and HTTP/1.1, and the
// tls-alpn-01 challenge of ACME. Each handshake uses the current certificates and client CAs.
func (s *Source) Config() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: protocols, GetConfigForClient: s.configFor}
}

var protocols = []string{"h2", "http/1.1"}

var errNoCertificate = errors.New("the ACME server has not issued a TLS certificate yet; 'msb server status' shows why")

// configFor returns the configuration for one handshake.
func (s *Source) configFor(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	if s.acme != nil && isChallenge(hello) {
		return s.acme.challenge, nil
	}
	config := s.live.Load().config
	if len(config.Certificates) == 0 {
		return nil, errNoCertificate
	}
	return config, nil
}

// Run loads changed files, and fetches and renews certificates, until ctx ends. Then it returns nil. With ACME, the
// gateway must be serving while Run runs, because it receives the challenges.
func (s *Source) Run(ctx context.Context) error {
	if s.acme != nil {
		// Run does not wait for this goroutine, because autocert cannot be canceled. An order in progress ends with the
		// process.
		go s.acme.run(ctx)
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			s.poll(now)
		}
	}
}

// poll reads the files and uses or rejects a change of them. It waits until two polls in a row find the same inputs,
// because while files are being replaced, one may be half-written, or not match the others yet.
func (s *Source) poll(now time.Time) {
	in := s.read()
	switch sum := in.sum(); sum {
	case s.decided:
		s.seen = sum
	case s.seen:
		s.decided = sum
		st, err := in.state()
		if err != nil {
			kept := *s.live.Load()
			kept.reloadErr = err
			st = &kept
		}
		s.live.Store(st)
		if err == nil {
			s.opts.Log.Info("TLS certificates in use", "names", allNames(st.config.Certificates))
		}
	default:
		s.seen = sum
	}
	s.logWarnings(now)
}

// logWarnings logs the warnings of the status that are new since the last call. A warning that counts days is logged
// once a day, because its text changes.
func (s *Source) logWarnings(now time.Time) {
	warnings := s.Status(now).Warnings
	for _, w := range warnings {
		if !slices.Contains(s.logged, w) {
			s.opts.Log.Warn("TLS needs attention", "warning", w)
		}
	}
	s.logged = warnings
}
