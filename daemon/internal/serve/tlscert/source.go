// Package tlscert is where the gateway's TLS comes from: a certificate and its key in files, which may
// be replaced at any time, or certificates that are fetched and renewed through ACME. A handshake
// uses what was last found good; it reads no file and waits for no server. Only the wiring enters.
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

// Options say where the certificates come from: from CertFile and KeyFile, or through ACME.
type Options struct {
	// CertFile and KeyFile hold the certificate chain, the server's own first, and its key, PEM.
	CertFile, KeyFile string
	// ClientCAFile, if set: clients must show a certificate that one of these CAs (PEM) signed. A change
	// holds for new connections; those that are open stay.
	ClientCAFile string
	// ACME, if it has Domains: certificates are fetched and renewed.
	ACME ACME
	Log  *slog.Logger
}

// interval is between two looks at the files. A change is taken when two looks in a row see the same.
const interval = 500 * time.Millisecond

// Source is an open source of certificates. It is safe for concurrent use, but Run is called once.
type Source struct {
	opts Options
	acme *fetcher // nil: files
	live atomic.Pointer[state]

	// Of Open, and then of Run: the material last looked at and last decided on, and the warnings in the log.
	seen, decided [sha256.Size]byte
	logged        []string
}

// state is what handshakes and Status see. It never changes; another takes its place.
type state struct {
	config    *tls.Config
	clientCAs []*x509.Certificate
	keyMode   fs.FileMode
	// reloadErr says why this state is not that of the files as they are now.
	reloadErr error
}

// Open reads the files, or the certificates that an earlier run fetched. Files that cannot be used are
// errdefs.ErrFailedPrecondition, contradictory options errdefs.ErrInvalidArgument. An expired
// certificate is used, with a warning.
func Open(o Options) (*Source, error) {
	if files := o.CertFile != "" && o.KeyFile != ""; files == (len(o.ACME.Domains) > 0) {
		return nil, fmt.Errorf("TLS: give a certificate file and a key file, or ACME domains: %w", errdefs.ErrInvalidArgument)
	}
	s := &Source{opts: o}
	if len(o.ACME.Domains) > 0 {
		var err error
		if s.acme, err = newFetcher(o.ACME, o.Log); err != nil {
			return nil, err
		}
	}
	m := s.read()
	st, err := m.state()
	if err != nil {
		return nil, err
	}
	s.seen = m.sum()
	s.decided = s.seen
	s.live.Store(st)
	s.logWarnings(time.Now())
	return s, nil
}

// Config is for the gateway's listener: TLS 1.2 and later, HTTP/2 and HTTP/1.1, and ACME's challenge.
// Each handshake gets the newest certificates and client CAs.
func (s *Source) Config() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: protocols, GetConfigForClient: s.configFor}
}

var protocols = []string{"h2", "http/1.1"}

var errNoCertificate = errors.New("no TLS certificate yet: the ACME server has not issued one; the status says why")

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

// Run takes changed files into use, and fetches and renews certificates, until ctx ends; it returns
// nil then. ACME's challenges come in through the gateway, so that must serve meanwhile.
func (s *Source) Run(ctx context.Context) error {
	if s.acme != nil {
		// Not waited for: autocert cannot be told to end. An order in progress ends with the process.
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

// poll decides on material that differs, once it has stayed the same from one look to the next: while
// files are being replaced, each may be half-written, or be of another set than the next.
func (s *Source) poll(now time.Time) {
	m := s.read()
	switch sum := m.sum(); sum {
	case s.decided:
		s.seen = sum
	case s.seen:
		s.decided = sum
		st, err := m.state()
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

// logWarnings logs the warnings of the status as they appear. Those that count days appear once a day.
func (s *Source) logWarnings(now time.Time) {
	warnings := s.Status(now).Warnings
	for _, w := range warnings {
		if !slices.Contains(s.logged, w) {
			s.opts.Log.Warn("TLS needs attention", "warning", w)
		}
	}
	s.logged = warnings
}
