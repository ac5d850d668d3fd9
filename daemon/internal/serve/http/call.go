package http

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// Call is one HTTP request that the Gateway handles, as an endpoint sees it.
type Call struct {
	// ID is the request id. It is also in the response (X-Request-Id) and in the log.
	ID string
	// Principal is the holder of the API key; the zero Principal for Open endpoints.
	Principal keys.Principal
	// Body is the complete body if the endpoint's Body is JSON. It is valid until Serve returns.
	Body []byte

	gateway  *Gateway
	began    time.Time
	client   netip.Addr // the client's address, also behind trusted proxies; the zero Addr if it is not known
	remote   string     // the remote address of the connection
	endpoint *Endpoint  // nil until the request is routed
	path     string     // the path of the endpoint's pattern, or unknownPath
	bucket   *limit.Bucket
	// namespaces are those that the request runs in, for the log.
	namespaces string
	response   response
	upload     *deadlineBody // nil unless the body of the endpoint is a Stream
	err        error         // the endpoint's error, or why the request was refused before the endpoint ran
	failed     bool          // the endpoint returned an error or panicked
	panicked   bool
	turn       turn
	inFlight   bool // the request counts as one of its key's that are in progress, until the response was written
	// endOnConnection, if set, makes the connection count as idle again after the response was written.
	endOnConnection func()

	mu            sync.Mutex
	outputBytes   int  // the output of runs that is held in memory
	responseBytes int  // the bytes of the response that count against the limits of the key and of the server
	bodyBytes     int  // the bytes that count for the request's body
	released      bool // whether the request has ended, so that no more bytes can be held
}

// ServeHTTP implements http.Handler.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.inProgress.Add(1)
	defer g.inProgress.Done()
	c := &Call{ID: rand.Text(), gateway: g, began: time.Now(), client: g.clientIP(r), remote: r.RemoteAddr, path: unknownPath}
	c.turn = turn{turns: g.turns, waits: 1} // until an endpoint serves it
	c.response = response{ResponseWriter: w, call: c}
	g.metrics.inFlight.Inc()
	defer g.metrics.inFlight.Dec()
	defer c.release()
	err := g.route(c, r)
	truncated := c.response.sent && c.response.hijacked == nil && c.failed
	cause := c.response.finish(err)
	g.metrics.countResponse(c.path, c.response.status)
	if cause != nil {
		g.logFailure(r.Context(), c, cause)
	}
	if truncated {
		panic(http.ErrAbortHandler) // so that the client notices that the response is incomplete
	}
}

// route makes the checks that apply to every request and passes the request to its endpoint. It returns why the request
// was refused, or the endpoint's error. A panic becomes an error as well.
func (g *Gateway) route(c *Call, r *http.Request) (err error) {
	defer func() {
		if v := recover(); v != nil {
			c.failed, c.panicked = true, true
			err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	if headerSize(r) > maxHeader {
		return newRefusal(http.StatusRequestHeaderFieldsTooLarge, fmt.Sprintf("the headers exceed the limit of %d bytes", maxHeader))
	}
	if g.Dev {
		if err := g.checkBrowser(r); err != nil {
			return err
		}
	}
	g.mux.ServeHTTP(&c.response, r)
	if c.endpoint != nil {
		return c.err
	}
	// No endpoint matched, so the mux wrote a response itself, which is replaced here.
	if c.response.status == http.StatusMethodNotAllowed {
		if _, exists := g.metrics.served[r.URL.Path]; exists {
			c.path = r.URL.Path
		}
		allow := c.response.Header().Get("Allow")
		message := "this path accepts only " + allow
		if r.URL.Path == rpc.RootPath {
			message += "; send calls to " + rpc.Path
		}
		refusal := newRefusal(http.StatusMethodNotAllowed, message)
		refusal.Header = http.Header{"Allow": {allow}}
		return refusal
	}
	return newRefusal(http.StatusNotFound, "there is nothing at this path; send requests to "+rpc.Path)
}

// serve passes a request to its endpoint, after the checks that the endpoint asks for. It sets c.err.
func (c *Call) serve(e *Endpoint, path string, r *http.Request) {
	c.endpoint, c.path, c.response.ctx = e, path, r.Context()
	if e.Scope == Open {
		c.err = e.Serve(c, &c.response, r)
		c.failed = c.err != nil
		return
	}
	c.err = c.gateway.serveWithKey(c, e, r)
}

// Source returns the client's address for the log. It includes the port unless a trusted proxy forwarded the request.
func (c *Call) Source() string {
	if remoteIP(c.remote) == c.client {
		return c.remote
	}
	return c.client.String()
}

// CountCalls counts the calls of a batch against the rate limit of the key. The first call is already counted. The batch
// runs even if it exceeds the limit; the requests after it then have to wait longer.
func (c *Call) CountCalls(calls int) { c.bucket.Owe(calls - 1) }

// Hold counts n more bytes of a run's output, which are held in memory until the response is sent, against the limits of
// the key and of the server. If a limit is exceeded, or the request has ended, the error is an *rpc.Error.
func (c *Call) Hold(n int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.released { // a library that the endpoint uses still works on a request that has ended
		return &rpc.Error{Code: rpc.CodeExhausted, Message: "the request has already ended"}
	}
	if excess := c.holdAtLeast(c.outputBytes + n); excess != limit.Within {
		return c.limitError(excess, " and the run was interrupted", "print less", ", write to a file")
	}
	c.outputBytes += n
	return nil
}

// holdResponse counts the size of the buffered response, in bytes. The response contains the output for which runs
// already hold bytes, so it counts only beyond those. The first g.freeBytes bytes of the rest do not count.
func (c *Call) holdResponse(bytes int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if excess := c.holdAtLeast(max(c.outputBytes, bytes-c.gateway.freeBytes)); excess != limit.Within {
		return c.limitError(excess, "", "request less data", "")
	}
	return nil
}

// holdAtLeast increases the bytes that count for the response to n, unless that would exceed a limit. The caller holds c.mu.
func (c *Call) holdAtLeast(n int) limit.Excess {
	if n <= c.responseBytes {
		return limit.Within
	}
	c.takeTurnsIfLarge(n + c.bodyBytes)
	excess := c.gateway.held.Hold(c.Principal.KeyID, n-c.responseBytes)
	if excess == limit.Within {
		c.responseBytes = n
	}
	return excess
}

// bodyCopies is how often a body counts: it and the params that are decoded from it exist until the call returns.
const bodyCopies = 2

// holdBody counts a body of the given size, in bytes, instead of what was counted for it before. Like those of the response,
// its first g.freeBytes bytes do not count. The error asks the client to try again, because nothing was started.
func (c *Call) holdBody(bytes int) error {
	n := bodyCopies * max(0, bytes-c.gateway.freeBytes)
	c.mu.Lock()
	defer c.mu.Unlock()
	if n > c.bodyBytes && c.gateway.held.Hold(c.Principal.KeyID, n-c.bodyBytes) != limit.Within {
		return fmt.Errorf("the pending requests and responses take too much memory; wait until some of them finish, or send shorter requests: %w",
			errdefs.ErrResourceExhausted)
	}
	if n < c.bodyBytes {
		c.gateway.held.Release(c.Principal.KeyID, c.bodyBytes-n)
	}
	c.bodyBytes = n
	return nil
}

// takeTurnsIfLarge makes the request take turns if it is to hold many bytes.
func (c *Call) takeTurnsIfLarge(bytes int) {
	if bytes > largeRequest {
		c.turn.need()
	}
}

// limitError returns the error for a response or output that exceeds a limit. It has no RetryAfter, so that clients do
// not repeat the request automatically, which would fail again.
func (c *Call) limitError(excess limit.Excess, effect, remedy, alternative string) *rpc.Error {
	whose, maxBytes, alternative := "this key", c.gateway.held.Each, alternative+", or send fewer requests at a time"
	if excess == limit.OverAll {
		whose, maxBytes, alternative = "all keys", c.gateway.held.All, ", or try again later"
	}
	return &rpc.Error{Code: rpc.CodeExhausted, Message: fmt.Sprintf("the pending responses of %s exceed %d MiB%s: %s%s",
		whose, maxBytes>>20, effect, remedy, alternative)}
}

// release gives back all bytes that the request holds, and its place among the requests in progress.
func (c *Call) release() {
	if c.inFlight {
		c.gateway.inFlight.Leave(c.Principal.KeyID)
	}
	if c.endOnConnection != nil {
		c.endOnConnection()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.released = true
	c.gateway.held.Release(c.Principal.KeyID, c.responseBytes+c.bodyBytes)
	c.responseBytes, c.bodyBytes = 0, 0
}

// Refusal is an error that determines the response to the client.
type Refusal struct {
	// Status is the HTTP status.
	Status int
	// Header has headers to set in addition to those of every response. It may be nil.
	Header http.Header
	// ClientError is the body of the response.
	ClientError *rpc.Error
	// ID is the id of the JSON-RPC request, or nil if it is not known.
	ID jsontext.Value
	// Cause is written to the log only. It must not contain text that a client sent.
	Cause error
}

func (r *Refusal) Error() string { return r.Cause.Error() }
func (r *Refusal) Unwrap() error { return r.Cause }

// newRefusal returns a Refusal of an invalid HTTP request. It is for faults of the HTTP request itself, not of the calls in
// its body.
func newRefusal(status int, message string) *Refusal {
	e := &rpc.Error{Code: rpc.CodeInvalidRequest, Message: message}
	return &Refusal{Status: status, ClientError: e, Cause: e}
}

// refusal converts err to the response that the client gets. It counts authentication failures.
func (c *Call) refusal(err error) *Refusal {
	if r, ok := errors.AsType[*Refusal](err); ok {
		return r
	}
	if tooLong, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return newRefusal(http.StatusRequestEntityTooLarge, fmt.Sprintf("the body exceeds the limit of %d bytes", tooLong.Limit))
	}
	clientErr := rpcerr.JSONRPC(err, c.ID)
	if clientErr.Code == rpc.CodeUnauthenticated {
		clientErr = ErrNoKey
		c.gateway.metrics.authFailures.Inc()
	}
	if !quotesNothing(clientErr.Code, err) {
		err = fmt.Errorf("error %d; the log does not contain its message, which may quote the request or the sandbox", clientErr.Code)
	}
	return &Refusal{Status: rpcerr.HTTPStatus(clientErr.Code), ClientError: clientErr, Cause: err}
}

// headerSize returns the approximate size of r's request line and headers on the wire, in bytes.
func headerSize(r *http.Request) int {
	size := len(r.Method) + len(r.RequestURI) + len(r.Host)
	for name, values := range r.Header {
		for _, v := range values {
			size += len(name) + len(v) + len(": \r\n")
		}
	}
	return size
}

// keyRejection returns why the request's key is no longer accepted if ctx ended because the key was revoked, expired or
// reset. Otherwise it returns nil.
func keyRejection(ctx context.Context) error {
	if cause := context.Cause(ctx); errdefs.IsUnauthorized(cause) {
		return cause
	}
	return nil
}
