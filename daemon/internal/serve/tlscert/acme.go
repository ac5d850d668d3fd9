package tlscert

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"
	"golang.org/x/net/idna"
)

// ACME configures how certificates are fetched. Setting Domains accepts the terms of service of the CA.
type ACME struct {
	// Domains are the host names. Each gets its own certificate. The CA must be able to reach this gateway at port 443
	// of each name.
	Domains []string
	// Email is the contact address for the CA. It may be empty.
	Email string
	// DirectoryURL is the directory URL of the ACME server; empty means Let's Encrypt. DirectoryCAFile is a PEM file of
	// the CAs that the server's own certificate must come from; empty means the CAs of the host.
	DirectoryURL, DirectoryCAFile string
	// CacheDir stores the account key, the certificates and their keys. It is created if needed.
	CacheDir string
}

const (
	requestTimeout = 30 * time.Second
	// A failed order is repeated after firstRetry. The delay doubles after each failure, up to maxRetry, because CAs
	// allow only a few failures per hour, and autocert remembers a failure for a minute.
	firstRetry = 2 * time.Minute
	maxRetry   = time.Hour
)

// fetcher fetches certificates through ACME. Only run orders certificates; handshakes never do. The manager renews
// them by itself.
type fetcher struct {
	manager   *autocert.Manager
	challenge *tls.Config
	server    *errorRecorder

	mu     sync.Mutex
	orders []*order
}

// order is the state of the certificate for one domain.
type order struct {
	domain string
	cert   *tls.Certificate // the current certificate, from the manager or from an earlier run's cache; nil if there is none yet
	err    error            // the error of the last attempt; nil if it succeeded
	wait   time.Duration    // the delay before the next attempt; 0 after a success
	next   time.Time        // when the next attempt may begin
}

// newFetcher returns a fetcher with the certificates that an earlier run left in the cache.
func newFetcher(o ACME, log *slog.Logger) (*fetcher, error) {
	f := &fetcher{}
	var domains []string
	for _, domain := range o.Domains {
		ascii, err := hostName(domain)
		if err != nil {
			return nil, fmt.Errorf("ACME domain %q: %w; use a full host name, such as msb.example.org: %w", domain, err, errdefs.ErrInvalidArgument)
		}
		if !slices.Contains(domains, ascii) {
			domains = append(domains, ascii)
			f.orders = append(f.orders, &order{domain: ascii})
		}
	}
	if err := makePrivateDir(o.CacheDir); err != nil {
		return nil, err
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	if o.DirectoryCAFile != "" {
		cas, err := readFile("ACME directory CA file", o.DirectoryCAFile).certificates()
		if err != nil {
			return nil, err
		}
		transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool(cas)}
	}
	f.server = &errorRecorder{RoundTripper: transport}
	f.manager = &autocert.Manager{
		Prompt:     autocert.AcceptTOS,
		Cache:      loggingCache{autocert.DirCache(o.CacheDir), log},
		HostPolicy: autocert.HostWhitelist(domains...),
		Email:      o.Email,
		Client: &acme.Client{
			DirectoryURL: cmp.Or(o.DirectoryURL, autocert.DefaultACMEDirectory),
			HTTPClient:   &http.Client{Transport: f.server, Timeout: requestTimeout},
			UserAgent:    "msbd",
		},
	}
	// The CA presents no client certificate, so challenge must not require one. This grants no access: net/http closes
	// these connections after the handshake, because their protocol is not HTTP.
	f.challenge = &tls.Config{
		MinVersion:             tls.VersionTLS12,
		NextProtos:             []string{acme.ALPNProto},
		SessionTicketsDisabled: true,
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			// autocert would look up any name in its cache, which means reading files.
			if !slices.Contains(domains, hello.ServerName) {
				return nil, fmt.Errorf("no ACME challenge for %q", hello.ServerName)
			}
			return f.manager.GetCertificate(hello)
		},
	}
	for _, order := range f.orders {
		order.cert = f.cached(order.domain)
	}
	return f, nil
}

// hostName returns domain as it appears in a certificate: in ASCII and without a trailing dot.
func hostName(domain string) (string, error) {
	ascii, err := idna.Lookup.ToASCII(strings.TrimSuffix(domain, "."))
	if err != nil {
		return "", err
	}
	if _, err := netip.ParseAddr(ascii); err == nil {
		return "", errors.New("it is an IP address")
	}
	if !strings.Contains(ascii, ".") {
		return "", errors.New("it has no dot")
	}
	return ascii, nil
}

// makePrivateDir creates dir. If dir exists, makePrivateDir checks that only its owner can access it.
func makePrivateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create ACME cache directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("check ACME cache directory: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("ACME cache directory %s (%s) contains keys, but other users can access it: run 'chmod 700 %[1]s': %[3]w",
			dir, info.Mode(), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// cached returns the certificate for domain from the cache, or nil if there is none that can be used.
func (f *fetcher) cached(domain string) *tls.Certificate {
	data, err := f.manager.Cache.Get(context.Background(), domain)
	if err != nil {
		return nil
	}
	// autocert keeps the key and the chain in one file.
	pair, err := tls.X509KeyPair(data, data)
	if err != nil || pair.Leaf.VerifyHostname(domain) != nil {
		return nil
	}
	return &pair
}

// isChallenge reports whether a handshake is the CA's check of a tls-alpn-01 challenge.
func isChallenge(hello *tls.ClientHelloInfo) bool {
	return len(hello.SupportedProtos) == 1 && hello.SupportedProtos[0] == acme.ALPNProto
}

// certificates returns the certificates that were fetched so far.
func (f *fetcher) certificates() (out []tls.Certificate) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, order := range f.orders {
		if order.cert != nil {
			out = append(out, *order.cert)
		}
	}
	return out
}

// warnings returns a warning for each domain whose last order failed.
func (f *fetcher) warnings() (out []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, order := range f.orders {
		if order.err != nil {
			out = append(out, fmt.Sprintf("no new TLS certificate for %s: %v; the next attempt is at %s",
				order.domain, order.err, order.next.UTC().Format(time.RFC3339)))
		}
	}
	return out
}

// renewalProblem says why a certificate that has expired, or will expire soon, was not renewed.
func (f *fetcher) renewalProblem() string {
	if last := f.server.lastErr.Load(); last != nil {
		return fmt.Sprintf("it was not renewed: %v", *last)
	}
	return "it has not been renewed yet"
}

// run orders missing certificates, one at a time, and fetches renewed ones from the manager, until ctx ends.
func (f *fetcher) run(ctx context.Context) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		for _, order := range f.orders {
			if ctx.Err() == nil {
				f.fetch(order)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// fetch sets o.cert to the manager's current certificate, which the manager orders if it has none. After a failure,
// fetch does nothing until o.next.
func (f *fetcher) fetch(o *order) {
	if time.Now().Before(o.next) {
		return
	}
	before := f.server.lastErr.Load()
	cert, err := f.manager.GetCertificate(&tls.ClientHelloInfo{
		ServerName: o.domain,
		// With this, autocert orders an ECDSA certificate, which all current clients support. An RSA certificate for
		// older clients would be a second order.
		CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256},
	})
	last := f.server.lastErr.Load()
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		o.cert, o.err, o.wait = cert, nil, 0
		return
	}
	if last != before {
		err = *last
	}
	o.err = err
	o.wait = min(max(2*o.wait, firstRetry), maxRetry)
	o.next = time.Now().Add(o.wait)
}

// loggingCache logs failed writes, which autocert ignores. Without the cache, each start of the server would order new
// certificates until the CA's limit is reached.
type loggingCache struct {
	autocert.DirCache
	log *slog.Logger
}

func (c loggingCache) Put(ctx context.Context, key string, data []byte) error {
	err := c.DirCache.Put(ctx, key, data)
	if err != nil {
		c.log.Error("could not store ACME data: make sure that the cache directory has free space and that msbd can write to it", "err", err)
	}
	return err
}

// errorRecorder records the last error of the ACME server. autocert does not return it: for a failed validation it only
// reports that no challenge is left, and for a failed renewal it reports nothing.
type errorRecorder struct {
	http.RoundTripper
	lastErr atomic.Pointer[error]
}

// maxProblem is how many bytes of a response are searched for an error.
const maxProblem = 64 << 10

// RoundTrip implements http.RoundTripper.
func (o *errorRecorder) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := o.RoundTripper.RoundTrip(r)
	if unknown := (x509.UnknownAuthorityError{}); errors.As(err, &unknown) {
		err = fmt.Errorf("%w: pass a file with its CA as --acme-directory-ca", err)
	}
	if err != nil {
		err = fmt.Errorf("reach the ACME server: %w", err)
		o.lastErr.Store(&err)
		return nil, err
	}
	head, err := io.ReadAll(io.LimitReader(resp.Body, maxProblem))
	if err != nil {
		resp.Body.Close()
		o.lastErr.Store(&err)
		return nil, err
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(head), resp.Body), resp.Body}
	if err := problem(resp.StatusCode, head); err != nil {
		o.lastErr.Store(&err)
	}
	return resp, nil
}

// problem returns the error in a response of the ACME server (RFC 8555, sections 6.7 and 8). This is either an error
// about the request or about a failed challenge. It returns nil if the response reports no error.
func problem(status int, body []byte) error {
	var response struct {
		Type       string `json:"type"`
		Detail     string `json:"detail"`
		Challenges []struct {
			Error struct {
				Detail string `json:"detail"`
			} `json:"error"`
		} `json:"challenges"`
	}
	if json.Unmarshal(body, &response) != nil {
		return nil
	}
	// badNonce is not a failure: the protocol expects it, and the client retries.
	if status >= 400 && response.Detail != "" && !strings.HasSuffix(response.Type, ":badNonce") {
		return fmt.Errorf("the ACME server says %q", response.Detail)
	}
	for _, c := range response.Challenges {
		if c.Error.Detail != "" {
			return fmt.Errorf("the ACME server says %q: check that it can reach this gateway at port 443 of that name", c.Error.Detail)
		}
	}
	return nil
}
