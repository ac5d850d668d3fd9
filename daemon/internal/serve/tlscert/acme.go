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

// ACME says how certificates are fetched. Whoever sets it accepts the CA's terms of service.
type ACME struct {
	// Domains are the host names, one certificate each. The CA must reach this gateway at port 443 of each.
	Domains []string
	// Email is where the CA may write to; it may be empty.
	Email string
	// DirectoryURL is the ACME server's; empty: Let's Encrypt's. DirectoryCAFile holds the CAs (PEM) that
	// vouch for it; empty: the host's.
	DirectoryURL, DirectoryCAFile string
	// CacheDir keeps the account's key, and certificates with theirs. It is made if needed.
	CacheDir string
}

const (
	requestTimeout = 30 * time.Second
	// A failed order is repeated after firstRetry, then after twice as long each time, up to maxRetry:
	// CAs allow few failures an hour, and autocert forgets one only after a minute.
	firstRetry = 2 * time.Minute
	maxRetry   = time.Hour
)

// fetcher gets certificates. The manager renews them by itself; handshakes never make it order.
type fetcher struct {
	manager   *autocert.Manager
	challenge *tls.Config
	server    *errorRecorder

	mu     sync.Mutex
	orders []*order
}

// order is a domain's certificate, or why there is none.
type order struct {
	domain string
	cert   *tls.Certificate // of the manager, or of an earlier run
	err    error
	wait   time.Duration
	next   time.Time
}

// newFetcher starts with what an earlier run left in the cache.
func newFetcher(o ACME, log *slog.Logger) (*fetcher, error) {
	f := &fetcher{}
	var domains []string
	for _, domain := range o.Domains {
		ascii, err := hostName(domain)
		if err != nil {
			return nil, fmt.Errorf("ACME domain %q: %w: give a whole host name, such as msb.example.org: %w", domain, err, errdefs.ErrInvalidArgument)
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
	// The CA shows no client certificate. What it connects to is closed by net/http after the
	// handshake, as this is no protocol of HTTP.
	f.challenge = &tls.Config{
		MinVersion:             tls.VersionTLS12,
		NextProtos:             []string{acme.ALPNProto},
		SessionTicketsDisabled: true,
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			// autocert would look for any name in its cache, which is files.
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

// hostName is domain as it is in a certificate.
func hostName(domain string) (string, error) {
	ascii, err := idna.Lookup.ToASCII(strings.TrimSuffix(domain, "."))
	if err != nil {
		return "", err
	}
	if _, err := netip.ParseAddr(ascii); err == nil {
		return "", errors.New("is an address")
	}
	if !strings.Contains(ascii, ".") {
		return "", errors.New("has no dot")
	}
	return ascii, nil
}

// makePrivateDir makes dir, or takes the one that is there if it is its owner's alone.
func makePrivateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make ACME cache directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("check ACME cache directory: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("ACME cache directory %s (%s) holds keys, but is open to others: chmod 700 it: %w", dir, info.Mode(), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// cached is the certificate that an earlier run fetched for domain, or nil.
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

func isChallenge(hello *tls.ClientHelloInfo) bool {
	return len(hello.SupportedProtos) == 1 && hello.SupportedProtos[0] == acme.ALPNProto
}

// certificates are those that there are.
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

func (f *fetcher) renewalProblem() string {
	if last := f.server.lastErr.Load(); last != nil {
		return fmt.Sprintf("it was not renewed: %v", *last)
	}
	return "it was not renewed yet"
}

// run orders what is missing, one certificate at a time, and takes what the manager has renewed.
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

// fetch makes the manager order order's certificate, unless it has one already.
func (f *fetcher) fetch(o *order) {
	if time.Now().Before(o.next) {
		return
	}
	before := f.server.lastErr.Load()
	cert, err := f.manager.GetCertificate(&tls.ClientHelloInfo{
		ServerName: o.domain,
		// What clients of today take. One with RSA for others would be another order.
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

// loggingCache says what it cannot keep, which autocert passes over: each start would order anew, up to the CA's limit.
type loggingCache struct {
	autocert.DirCache
	log *slog.Logger
}

func (c loggingCache) Put(ctx context.Context, key string, data []byte) error {
	err := c.DirCache.Put(ctx, key, data)
	if err != nil {
		c.log.Error("keep what ACME fetched: make room in the cache directory, and let msbd write there", "err", err)
	}
	return err
}

// errorRecorder keeps what last went wrong with the ACME server. autocert does not tell: of a failed
// validation it says that no challenge was left, and of a failed renewal nothing.
type errorRecorder struct {
	http.RoundTripper
	lastErr atomic.Pointer[error]
}

const maxProblem = 64 << 10

func (o *errorRecorder) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := o.RoundTripper.RoundTrip(r)
	if unknown := (x509.UnknownAuthorityError{}); errors.As(err, &unknown) {
		err = fmt.Errorf("%w: give a file of its CA as --acme-directory-ca", err)
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

// problem is what an answer of the ACME server complains of (RFC 8555, sections 6.7 and 8): the request,
// or a challenge that failed.
func problem(status int, body []byte) error {
	var answer struct {
		Type       string `json:"type"`
		Detail     string `json:"detail"`
		Challenges []struct {
			Error struct {
				Detail string `json:"detail"`
			} `json:"error"`
		} `json:"challenges"`
	}
	if json.Unmarshal(body, &answer) != nil {
		return nil
	}
	// A bad nonce is part of the protocol: the client tries again.
	if status >= 400 && answer.Detail != "" && !strings.HasSuffix(answer.Type, ":badNonce") {
		return fmt.Errorf("the ACME server says %q", answer.Detail)
	}
	for _, c := range answer.Challenges {
		if c.Error.Detail != "" {
			return fmt.Errorf("the ACME server says %q: see that it reaches this gateway at port 443 of that name", c.Error.Detail)
		}
	}
	return nil
}
