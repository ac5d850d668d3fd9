package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
)

// DefaultServerURL is where msbd answers unless it was told otherwise.
const DefaultServerURL = "http://127.0.0.1:5555"

const (
	// How long calls may take in all. That of a start is longer than the server's own limit.
	healthLimit = 10 * time.Second
	queryLimit  = 30 * time.Second
	startLimit  = 3 * time.Minute
	stopLimit   = 2 * time.Minute
	// runSlack is what a run may take beyond its time limit: its turn, and the way.
	runSlack = 2 * time.Minute

	// maxAttempts is how often a call is sent that surely, or harmlessly, did not run before.
	maxAttempts = 3
	// firstPause is before the second attempt; it doubles.
	firstPause = 100 * time.Millisecond
	// maxPause is the longest Retry-After that is waited for.
	maxPause = 10 * time.Second

	// maxAnswer is more than the server lets a run print, in the longest spelling.
	maxAnswer = 256 << 20
)

// Client calls msbd over HTTP, for whoever holds an API key. The zero value calls DefaultServerURL without
// a key, which only a server in dev mode takes. It is safe for concurrent use. Fields must not be changed
// after the first call.
//
// A call ends when its context does; the server then interrupts the run that it began. A call is sent again
// only when that cannot run anything twice: when nothing listened, when the server said before it began when
// to come back (429), or when it was not ready for a call that is harmless to repeat. Runs and stops are never
// among the last.
//
// Failures that the server told are an [*Error]. When nothing listens at the URL, the error is
// [ErrNotRunning]. No error holds the key.
type Client struct {
	// ServerURL is https://HOST[:PORT], and may have a path below which a proxy has put msbd. With http://, a
	// Key goes to loopback addresses only. Empty means DefaultServerURL.
	ServerURL string
	Key       Key
	// HTTP makes the requests; nil means a client of this package. Its Timeout should be 0: calls are limited
	// one by one. It follows no redirects.
	HTTP *http.Client
}

// Health returns nil if msbd answers at the URL. It sends no key.
func (c *Client) Health(ctx context.Context) error {
	ctx, cancel := limited(ctx, healthLimit)
	defer cancel()
	req, err := c.newRequest(ctx, http.MethodGet, rpc.HealthPath, nil)
	if err != nil {
		return err
	}
	a, err := c.exchange(req)
	if err != nil {
		return fmt.Errorf("ask for the server's health: %w", err)
	}
	var health struct {
		Message string `json:"message"`
	}
	if a.status != http.StatusOK || a.decode(&health) != nil || health.Message == "" {
		return a.foreign()
	}
	return nil
}

// Discover returns the server's own description of its methods, an OpenRPC document in JSON.
func (c *Client) Discover(ctx context.Context) ([]byte, error) {
	doc, err := post[jsontext.Value](ctx, c, request{method: rpc.MethodDiscover, limit: queryLimit, repeatable: true})
	return doc, err
}

// Metrics says what the sandboxes of a namespace use. An empty namespace is the key's own, or default for a
// key that is not limited to one; [rpc.AllNamespaces] is all that the key may see.
func (c *Client) Metrics(ctx context.Context, namespace string) ([]rpc.SandboxMetrics, error) {
	res, err := post[rpc.MetricsResult](ctx, c, request{
		method: rpc.MethodSandboxMetricsGet, params: rpc.MetricsParams{Namespace: optional(namespace)},
		limit: queryLimit, repeatable: true,
	})
	return res.Sandboxes, err
}

// optional is nil for a namespace that the server is to choose.
func optional(namespace string) *string {
	if namespace == "" {
		return nil
	}
	return &namespace
}

// request is one call to be made.
type request struct {
	method string
	params any
	// limit is how long it may take in all; 0 means as long as its context.
	limit time.Duration
	// repeatable says that a second run of it does no harm.
	repeatable bool
}

// post makes a call and decodes what it returned.
func post[R any](ctx context.Context, c *Client, r request) (result R, err error) {
	body, err := marshal(r)
	if err != nil {
		return result, err
	}
	if r.limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = limited(ctx, r.limit)
		defer cancel()
	}
	raw, err := c.attempt(ctx, r, body)
	if err != nil {
		return result, err
	}
	if err := json.Unmarshal(raw, &result); err != nil {
		return result, fmt.Errorf("read the result of %s, which this client does not know in this form: %w: %w", r.method, err, errdefs.ErrUnknown)
	}
	return result, nil
}

func marshal(r request) (body []byte, err error) {
	req := rpc.Request{JSONRPC: rpc.Version, Method: r.method, ID: jsontext.Value("1")}
	if r.params != nil {
		req.Params, err = json.Marshal(r.params)
	}
	if err == nil {
		body, err = json.Marshal(req)
	}
	if err != nil {
		return nil, fmt.Errorf("write the request %s: %w: %w", r.method, err, errdefs.ErrInvalidArgument)
	}
	return body, nil
}

func limited(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %s: %w", limit, context.DeadlineExceeded))
}

// attempt sends a request until it has an answer that counts.
func (c *Client) attempt(ctx context.Context, r request, body []byte) (jsontext.Value, error) {
	pause := firstPause
	for n := 1; ; n++ {
		result, err := c.send(ctx, r, body)
		if err == nil || n == maxAttempts || !r.again(err) {
			return result, err
		}
		wait := pause
		if e, ok := errors.AsType[*Error](err); ok {
			wait = max(wait, e.RetryAfter)
		}
		if wait > maxPause {
			return nil, err
		}
		wait += rand.N(wait / 4) // so that many clients do not come back at once
		pause *= 2
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w (while waiting to send again: %w)", err, ended(ctx))
		}
	}
}

// again says whether a request that failed may be sent once more.
func (r *request) again(err error) bool {
	if errors.Is(err, ErrNotRunning) {
		return true // nothing was sent
	}
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return false
	}
	// Without a time to come back, a run was interrupted because it printed too much.
	busy := e.Status == http.StatusTooManyRequests
	return busy && e.RetryAfter > 0 || r.repeatable && (busy || e.Status == http.StatusServiceUnavailable)
}

// send sends a request once.
func (c *Client) send(ctx context.Context, r request, body []byte) (jsontext.Value, error) {
	req, err := c.newRequest(ctx, http.MethodPost, rpc.Path, body)
	if err == nil {
		err = c.authorize(req)
	}
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	if r.repeatable {
		// Not sent: it tells net/http that it may send the request again when an idle connection turns out closed.
		req.Header["Idempotency-Key"] = nil
	}
	a, err := c.exchange(req)
	if err != nil {
		return nil, fmt.Errorf("call %s: %w", r.method, err)
	}
	return a.result()
}

func (c *Client) newRequest(ctx context.Context, method, path string, body []byte) (*http.Request, error) {
	base, err := parseServerURL(c.serverURL())
	if err != nil {
		return nil, err
	}
	return http.NewRequestWithContext(ctx, method, base.JoinPath(path).String(), bytes.NewReader(body))
}

// authorize adds the key, if there is one and it would travel unread.
func (c *Client) authorize(req *http.Request) error {
	host := req.URL.Hostname()
	switch {
	case c.Key.IsZero():
		return nil
	case !c.Key.sendable():
		return fmt.Errorf("the API key holds a space or another character that no key has: copy it whole, and nothing of what is around it: %w", errdefs.ErrInvalidArgument)
	case req.URL.Scheme != "https" && !isLoopback(host):
		return fmt.Errorf("the API key is not sent to %s over plain http, where others could read it: use https, or a tunnel "+
			"('ssh -L 5555:127.0.0.1:5555 %s', and then %s): %w", host, host, DefaultServerURL, errdefs.ErrInvalidArgument)
	}
	req.Header.Set("Authorization", "Bearer "+*c.Key.text)
	return nil
}

// exchange makes one HTTP exchange and reads the answer to its end.
func (c *Client) exchange(req *http.Request) (*answer, error) {
	res, err := c.http().Do(req)
	if err != nil {
		return nil, c.explain(req.Context(), err)
	}
	defer res.Body.Close()
	a := &answer{status: res.StatusCode, header: res.Header}
	if a.body, err = io.ReadAll(io.LimitReader(res.Body, maxAnswer+1)); err != nil {
		return nil, c.explain(req.Context(), err)
	}
	if len(a.body) > maxAnswer {
		return nil, fmt.Errorf("the answer is longer than %d MiB: %w", maxAnswer>>20, errdefs.ErrResourceExhausted)
	}
	return a, nil
}

func (c *Client) serverURL() string {
	if c.ServerURL != "" {
		return c.ServerURL
	}
	return DefaultServerURL
}

// parseServerURL does not repeat the URL in its error: it may hold a password.
func parseServerURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("the server's URL must be https://HOST[:PORT] or http://HOST[:PORT], without a user, query or fragment: %w", errdefs.ErrInvalidArgument)
	}
	return u, nil
}

// isLoopback says whether a host can only be this machine.
func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && addr.Unmap().IsLoopback()
}

// sharedHTTP serves the Clients without an HTTP of their own.
var sharedHTTP = &http.Client{Transport: &http.Transport{
	Proxy:               http.ProxyFromEnvironment,
	DialContext:         (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
	TLSHandshakeTimeout: 10 * time.Second,
	ForceAttemptHTTP2:   true,
	MaxIdleConnsPerHost: 64,
	// Before the server's own limit, so that no run is sent into a connection that is being closed.
	IdleConnTimeout: 30 * time.Second,
}}

func (c *Client) http() *http.Client {
	h := sharedHTTP
	if c.HTTP != nil {
		h = c.HTTP
	}
	straight := *h
	straight.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &straight
}

// ended is why ctx ended, in a form that errors.Is finds context's own errors in.
func ended(ctx context.Context) error {
	cause := context.Cause(ctx)
	if errors.Is(cause, ctx.Err()) {
		return cause
	}
	return fmt.Errorf("%w: %w", ctx.Err(), cause)
}

// explain turns the error of an exchange without an answer into one that says what to do about it.
func (c *Client) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ended(ctx)
	}
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	dial, dialing := errors.AsType[*net.OpError](err)
	if dialing && dial.Op == "dial" && errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%w: nothing listens at %s. Start it with 'msb server start', or name another server with %s",
			ErrNotRunning, c.serverURL(), EnvServerURL)
	}
	hint := "see whether the server runs and its URL is right"
	if errors.Is(err, http.ErrSchemeMismatch) {
		hint = "the server speaks plain http: on its own machine use http://, elsewhere have its administrator set up TLS"
	} else if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		hint = "no authority that this machine trusts signed the server's certificate. If it is your own, name the file of its certificate in SSL_CERT_FILE"
	} else if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		hint = "use the name that the server's certificate is for, or have its administrator renew it"
	}
	return fmt.Errorf("reach %s: %w; %s: %w", c.serverURL(), err, hint, errdefs.ErrUnavailable)
}
