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
	"runtime"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
)

// DefaultServerURL is the default URL of msbd's HTTP gateway.
const DefaultServerURL = "http://127.0.0.1:5555"

const (
	// The timeouts of calls, including retries. startTimeout is longer than the server's own limit for a boot, which does
	// not include the time that a start waits for its turn.
	healthTimeout = 10 * time.Second
	queryTimeout  = 30 * time.Second
	startTimeout  = 3 * time.Minute
	stopTimeout   = 2 * time.Minute
	// runSlack is added to a run's timeout to allow for the time in the queue and on the network.
	runSlack = 2 * time.Minute

	// maxAttempts is the maximum number of times that a call is sent.
	maxAttempts = 3
	// firstPause is the pause before the second attempt. It doubles with each attempt.
	firstPause = 100 * time.Millisecond
	// maxPause is the longest pause; a call that would have to wait longer fails.
	maxPause = 10 * time.Second

	// maxResponse is larger than the output that the server allows for a run, in its longest JSON encoding.
	maxResponse = 256 << 20
)

// Client calls msbd over HTTP with an API key. The zero value calls DefaultServerURL without a key, which only
// a server in dev mode accepts. It is safe for concurrent use. Its fields must not be changed after the first
// call.
//
// A call ends when its context is done; the server then interrupts the run that the call started. A call is
// retried only if that cannot run anything twice: if nothing listens at the URL, if the server refused the call
// before it began and said when to retry (status 429), or if the server was busy or not ready and the call is
// idempotent. Runs and stops are not idempotent.
//
// Errors that the server returns are an [*Error]. If nothing listens at the URL, the error is [ErrNotRunning].
// No error contains the key.
type Client struct {
	// ServerURL is https://HOST[:PORT], with a path if a proxy serves msbd below one. With http://, the key is
	// sent only to loopback addresses. Empty means DefaultServerURL.
	ServerURL string
	Key       Key
	// HTTP makes the requests; nil means a client of this package. Its Timeout should be 0, because each call
	// has its own time limit. Redirects are not followed, whatever its CheckRedirect is.
	HTTP *http.Client
}

// Health returns nil if msbd answers at the URL. It does not send the key.
func (c *Client) Health(ctx context.Context) error {
	ctx, cancel := withTimeout(ctx, healthTimeout)
	defer cancel()
	req, err := c.newRequest(ctx, http.MethodGet, rpc.HealthPath, nil)
	if err != nil {
		return err
	}
	res, err := c.do(req)
	if err != nil {
		return fmt.Errorf("get the server's health: %w", err)
	}
	var health struct {
		Message string `json:"message"`
	}
	if res.status != http.StatusOK || res.decode(&health) != nil || health.Message == "" {
		return res.unexpected()
	}
	return nil
}

// Discover returns the server's description of its API, an OpenRPC document in JSON.
func (c *Client) Discover(ctx context.Context) ([]byte, error) {
	doc, err := post[jsontext.Value](ctx, c, request{method: rpc.MethodDiscover, timeout: queryTimeout, idempotent: true})
	return doc, err
}

// Metrics returns the resource usage of the sandboxes in a namespace. An empty namespace means the key's own,
// or default for a key that is not limited to one. [rpc.AllNamespaces] means all namespaces of the key.
func (c *Client) Metrics(ctx context.Context, namespace string) ([]rpc.SandboxMetrics, error) {
	res, err := post[rpc.MetricsResult](ctx, c, request{
		method: rpc.MethodSandboxMetricsGet, params: rpc.MetricsParams{Namespace: namespaceParam(namespace)},
		timeout: queryTimeout, idempotent: true,
	})
	return res.Sandboxes, err
}

// ListSandboxes returns the sandboxes in a namespace, in whatever state they are, sorted by namespace and name. An empty
// namespace means the key's own, or default for a key that is not limited to one. [rpc.AllNamespaces] means all
// namespaces of the key.
func (c *Client) ListSandboxes(ctx context.Context, namespace string) ([]rpc.SandboxInfo, error) {
	var all []rpc.SandboxInfo
	for after := ""; ; {
		page, err := post[rpc.ListResult](ctx, c, request{
			method: rpc.MethodSandboxList, params: rpc.ListParams{Namespace: namespaceParam(namespace), After: after},
			timeout: queryTimeout, idempotent: true,
		})
		if err != nil {
			return nil, err
		}
		all = append(all, page.Sandboxes...)
		if page.Next <= after { // empty on the last page
			return all, nil
		}
		after = page.Next
	}
}

// namespaceParam returns the namespace as a param. An empty namespace becomes nil, and the server then chooses one.
func namespaceParam(namespace string) *string {
	if namespace == "" {
		return nil
	}
	return &namespace
}

// request is a call to be made.
type request struct {
	method string
	params any
	// timeout is the timeout of the call, including retries. 0 means that only the call's context ends it.
	timeout time.Duration
	// idempotent is set if running the call twice does no harm.
	idempotent bool
}

// post makes a call and decodes its result.
func post[R any](ctx context.Context, c *Client, r request) (result R, err error) {
	body, err := marshal(r)
	if err != nil {
		return result, err
	}
	if r.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = withTimeout(ctx, r.timeout)
		defer cancel()
	}
	raw, err := withRetries(ctx, r, func() (jsontext.Value, error) { return c.send(ctx, r, body) })
	if err != nil {
		return result, err
	}
	if err := json.Unmarshal(raw, &result); err != nil {
		return result, errorf(errdefs.ErrUnknown, "decode the result of %s: %w", r.method, err)
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
	if e, ok := errors.AsType[*jsontext.SyntacticError](err); ok { // the only syntax that a Go value can violate
		return nil, errorf(errdefs.ErrInvalidArgument, "%s is not valid UTF-8", e.JSONPointer.LastToken())
	}
	if err != nil {
		return nil, errorf(errdefs.ErrInvalidArgument, "encode the request %s: %w", r.method, err)
	}
	return body, nil
}

func withTimeout(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, timeout, errorf(context.DeadlineExceeded, "no response within %s", timeout))
}

// withRetries calls send, and calls it again while the request may be retried. send sends the request once.
func withRetries[R any](ctx context.Context, r request, send func() (R, error)) (result R, err error) {
	pause := firstPause
	for n := 1; ; n++ {
		result, err = send()
		if err == nil || n == maxAttempts || !r.retryable(err) {
			return result, err
		}
		wait := pause
		if e, ok := errors.AsType[*Error](err); ok {
			wait = max(wait, e.RetryAfter)
		}
		if wait > maxPause {
			return result, err
		}
		wait += rand.N(wait / 4) // jitter, so that many clients do not retry at the same time
		pause *= 2
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return result, fmt.Errorf("%w (while waiting to retry: %w)", err, contextError(ctx))
		}
	}
}

// retryable reports whether a request that failed with err may be sent again.
func (r *request) retryable(err error) bool {
	if errors.Is(err, ErrNotRunning) {
		return true // nothing was sent
	}
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return false
	}
	// Status 429 without Retry-After also means that a run was interrupted because it printed too much.
	busy := e.Status == http.StatusTooManyRequests
	return busy && e.RetryAfter > 0 || r.idempotent && (busy || e.Status == http.StatusServiceUnavailable)
}

// send sends a request once.
func (c *Client) send(ctx context.Context, r request, body []byte) (jsontext.Value, error) {
	req, err := c.newCall(ctx, body)
	if err != nil {
		return nil, err
	}
	if r.idempotent {
		// A nil value is not sent. It tells net/http to retry the request if the server closes an idle connection.
		req.Header["Idempotency-Key"] = nil
	}
	res, err := c.do(req)
	if err != nil {
		return nil, err
	}
	return res.result()
}

// newCall returns the HTTP request of a call.
func (c *Client) newCall(ctx context.Context, body []byte) (*http.Request, error) {
	req, err := c.newRequest(ctx, http.MethodPost, rpc.Path, bytes.NewReader(body))
	if err == nil {
		err = c.authorize(req)
	}
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	return req, nil
}

func (c *Client) newRequest(ctx context.Context, method, path string, body io.Reader) (*http.Request, error) {
	base, err := parseServerURL(c.serverURL())
	if err != nil {
		return nil, err
	}
	return http.NewRequestWithContext(ctx, method, base.JoinPath(path).String(), body)
}

// authorize adds the key, if there is one. It is an error if others could read the key on the network.
func (c *Client) authorize(req *http.Request) error {
	host := req.URL.Hostname()
	switch {
	case c.Key.IsZero():
		return nil
	case !c.Key.validHeader():
		return errorf(errdefs.ErrInvalidArgument, "the API key contains a space or another character that keys never contain: copy the complete key and nothing else")
	case req.URL.Scheme != "https" && !isLoopback(host):
		return errorf(errdefs.ErrInvalidArgument, "the API key is not sent to %s over plain http, because others could read it: use https, or a tunnel "+
			"('ssh -L 5555:127.0.0.1:5555 %s', then the URL %s)", host, host, DefaultServerURL)
	}
	req.Header.Set("Authorization", "Bearer "+*c.Key.text)
	return nil
}

// do sends an HTTP request and reads the response to the end.
func (c *Client) do(req *http.Request) (*response, error) {
	res, err := c.http().Do(req)
	if err != nil {
		return nil, c.explain(req.Context(), err)
	}
	return c.readResponse(req.Context(), res)
}

// readResponse reads a response to the end and closes its body.
func (c *Client) readResponse(ctx context.Context, res *http.Response) (*response, error) {
	defer res.Body.Close()
	r := &response{status: res.StatusCode, header: res.Header}
	var err error
	if r.body, err = io.ReadAll(io.LimitReader(res.Body, maxResponse+1)); err != nil {
		return nil, c.explain(ctx, err)
	}
	if len(r.body) > maxResponse {
		return nil, errorf(errdefs.ErrResourceExhausted, "the response is longer than %d MiB", maxResponse>>20)
	}
	return r, nil
}

func (c *Client) serverURL() string {
	if c.ServerURL != "" {
		return c.ServerURL
	}
	return DefaultServerURL
}

// parseServerURL parses and checks the URL of a server. Its error does not contain the URL, which may contain a
// password.
func parseServerURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, errorf(errdefs.ErrInvalidArgument, "the server's URL must be https://HOST[:PORT] or http://HOST[:PORT], without a user, query or fragment")
	}
	for _, path := range []string{rpc.Path, rpc.MCPPath} {
		if strings.HasSuffix(strings.TrimSuffix(u.Path, "/"), path) {
			return nil, errorf(errdefs.ErrInvalidArgument, "the server's URL must not end with %s: leave that out", path)
		}
	}
	return u, nil
}

// isLoopback reports whether a host is certainly this machine.
func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && addr.Unmap().IsLoopback()
}

// sharedHTTP is used by every Client whose HTTP field is nil.
var sharedHTTP = &http.Client{Transport: &http.Transport{
	Proxy:               http.ProxyFromEnvironment,
	DialContext:         (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
	TLSHandshakeTimeout: 10 * time.Second,
	ForceAttemptHTTP2:   true,
	MaxIdleConnsPerHost: 64,
	// Less than the server's own limit, so that no run is sent on a connection that the server is closing.
	IdleConnTimeout: 30 * time.Second,
}}

func (c *Client) http() *http.Client {
	h := sharedHTTP
	if c.HTTP != nil {
		h = c.HTTP
	}
	noRedirects := *h
	noRedirects.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &noRedirects
}

// contextError returns the cause of a context that is done. The error also matches ctx.Err().
func contextError(ctx context.Context) error {
	cause := context.Cause(ctx)
	if errors.Is(cause, ctx.Err()) {
		return cause
	}
	return fmt.Errorf("%w: %w", ctx.Err(), cause)
}

// explain converts the error of a request that got no response into one that says what to do.
func (c *Client) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	dial, dialing := errors.AsType[*net.OpError](err)
	if dialing && dial.Op == "dial" && errors.Is(err, errConnectionRefused) {
		start := "Start it with 'msb server start', or set"
		if runtime.GOOS != "linux" { // msbd runs on Linux only
			start = "Set"
		}
		return fmt.Errorf("%w: nothing listens at %s. %s %s to the URL of another server", ErrNotRunning, c.serverURL(), start, EnvServerURL)
	}
	hint := "check that the server is running and that its URL is right"
	if errors.Is(err, http.ErrSchemeMismatch) {
		hint = "the server speaks plain http: use http:// on its own machine; elsewhere, ask its administrator to set up TLS"
	} else if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		hint = "the server's certificate is not signed by an authority that this machine trusts. If the authority is your own, " +
			"set SSL_CERT_FILE to the file of its certificate"
	} else if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		hint = "use the name that the server's certificate is for, or ask its administrator to renew the certificate"
	}
	return errorf(errdefs.ErrUnavailable, "reach %s: %w; %s", c.serverURL(), err, hint)
}
