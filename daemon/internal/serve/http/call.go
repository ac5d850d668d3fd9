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

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// Call is one HTTP request on its way through the Gateway, as an endpoint sees it.
type Call struct {
	// ID is the request id, which the response and the log have.
	ID string
	// Principal is whom the request speaks for.
	Principal keys.Principal
	// Body is the whole body, if the endpoint's rule is JSON. It is valid until Serve returns.
	Body []byte

	gateway  *Gateway
	began    time.Time
	client   netip.Addr // whose request it is, also behind trusted proxies; not valid if it cannot be told
	remote   string     // the address of the connection
	endpoint *Endpoint  // nil before the route is known
	path     string     // of the endpoint, or unknownPath
	bucket   *limit.Bucket
	response response
	err      error // of the endpoint, or why its key was refused
	failed   bool  // the endpoint returned an error or panicked
	panicked bool

	mu       sync.Mutex
	reserved int  // bytes of output that runs hold
	held     int  // bytes that are counted for this request
	released bool // nothing is held any more
}

// ServeHTTP answers one request.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.inProgress.Add(1)
	defer g.inProgress.Done()
	c := &Call{ID: rand.Text(), gateway: g, began: time.Now(), client: g.clientIP(r), remote: r.RemoteAddr, path: unknownPath}
	c.response = response{ResponseWriter: w, call: c, buffer: newBuffer()}
	g.metrics.inFlight.Inc()
	defer g.metrics.inFlight.Dec()
	defer c.release()
	err := g.route(c, r)
	truncated := c.response.sent && c.response.hijacked == nil && c.failed
	refused := c.response.finish(err)
	g.metrics.countResponse(c.path, c.response.status)
	if refused != nil {
		g.logRefused(r.Context(), c, refused)
	}
	if truncated {
		panic(http.ErrAbortHandler) // so that the client does not take a part of the response for all of it
	}
}

// route turns a panic into an error.
func (g *Gateway) route(c *Call, r *http.Request) (err error) {
	defer func() {
		if v := recover(); v != nil {
			c.failed, c.panicked = true, true
			err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	if headerSize(r) > maxHeader {
		return newRefusal(http.StatusRequestHeaderFieldsTooLarge, fmt.Sprintf("headers hold at most %d bytes", maxHeader))
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
	// The mux has answered by itself.
	if c.response.status == http.StatusMethodNotAllowed {
		if _, exists := g.metrics.served[r.URL.Path]; exists {
			c.path = r.URL.Path
		}
		allow := c.response.Header().Get("Allow")
		refused := newRefusal(http.StatusMethodNotAllowed, "this path takes "+allow)
		refused.Header = http.Header{"Allow": {allow}}
		return refused
	}
	return newRefusal(http.StatusNotFound, "there is nothing at this path; requests go to "+rpc.Path)
}

// serve has an endpoint answer.
func (c *Call) serve(e *Endpoint, path string, r *http.Request) {
	c.endpoint, c.path, c.response.ctx = e, path, r.Context()
	if e.Scope == Open {
		c.err = e.Serve(c, &c.response, r)
		c.failed = c.err != nil
		return
	}
	c.err = c.gateway.serveWithKey(c, e, r)
}

// Source is where the request came from, for the log: with the port, unless a proxy passed it on.
func (c *Call) Source() string {
	if remoteIP(c.remote) == c.client {
		return c.remote
	}
	return c.client.String()
}

// CountCalls counts the calls of a batch beyond the first, which is counted already, against the rate of the key. The
// batch runs all the same: what comes after it waits for longer.
func (c *Call) CountCalls(calls int) { c.bucket.Owe(calls - 1) }

// Hold counts n more bytes of a run's output, which are held until the response is sent, against the bounds of the
// key and of the server. Its error is an *rpc.Error.
func (c *Call) Hold(n int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.released { // a library went on without its request
		return &rpc.Error{Code: rpc.CodeExhausted, Message: "the request was answered already: output limit of the run reached"}
	}
	if excess := c.holdAtLeast(max(c.reserved+n, c.held)); excess != limit.Within {
		return c.limitError(excess, " and the run was interrupted", "print less", ", write to a file", ": output limit of the run reached")
	}
	c.reserved += n
	return nil
}

// holdResponse counts the bytes of the response, which replace those that a run held.
func (c *Call) holdResponse(bytes int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if excess := c.holdAtLeast(max(c.reserved, bytes-c.gateway.uncounted)); excess != limit.Within {
		return c.limitError(excess, "", "ask for less", "", "")
	}
	return nil
}

// holdAtLeast makes the bytes that are held at least n. The caller holds c.mu.
func (c *Call) holdAtLeast(n int) limit.Excess {
	if n <= c.held {
		return limit.Within
	}
	excess := c.gateway.held.Hold(c.Principal.KeyID, n-c.held)
	if excess == limit.Within {
		c.held = n
	}
	return excess
}

// limitError is without a word of trying again: the same request would come to the same end.
func (c *Call) limitError(excess limit.Excess, what, remedy, orElse, end string) *rpc.Error {
	bound, most, orElse := "this key waits", c.gateway.held.Each, orElse+", or wait for fewer answers at a time"
	if excess == limit.OverAll {
		bound, most, orElse = "all keys wait", c.gateway.held.All, ", or try again later"
	}
	return &rpc.Error{Code: rpc.CodeExhausted, Message: fmt.Sprintf("the answers that %s for hold more than %d MiB%s: %s%s%s", bound, most>>20, what, remedy, orElse, end)}
}

// release ends the count of what is held.
func (c *Call) release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.released = true
	c.gateway.held.Release(c.Principal.KeyID, c.held)
	c.held = 0
}

// Refusal is an error that says exactly what the client is told. Cause is for the log, where nothing may be that a
// client made up.
type Refusal struct {
	Status      int
	Header      http.Header // beside those of every response; may be nil
	ClientError *rpc.Error
	Cause       error
}

func (r *Refusal) Error() string { return r.Cause.Error() }
func (r *Refusal) Unwrap() error { return r.Cause }

// newRefusal says what is wrong with the HTTP request, rather than with what it asks for.
func newRefusal(status int, message string) *Refusal {
	e := &rpc.Error{Code: rpc.CodeInvalidRequest, Message: message}
	return &Refusal{Status: status, ClientError: e, Cause: e}
}

// refusal is what the client is told of an error. Its cause may be told to nobody.
func (c *Call) refusal(err error) *Refusal {
	if r, ok := errors.AsType[*Refusal](err); ok {
		return r
	}
	if tooLong, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return newRefusal(http.StatusRequestEntityTooLarge, fmt.Sprintf("a body holds at most %d bytes", tooLong.Limit))
	}
	told := rpcerr.JSONRPC(err, c.ID)
	if told.Code == rpc.CodeUnauthenticated {
		told = ErrNoKey
		c.gateway.metrics.authFailures.Inc()
	}
	return &Refusal{Status: rpcerr.HTTPStatus(told.Code), ClientError: told, Cause: err}
}

func headerSize(r *http.Request) int {
	size := len(r.Method) + len(r.RequestURI) + len(r.Host)
	for name, values := range r.Header {
		for _, v := range values {
			size += len(name) + len(v) + len(": \r\n")
		}
	}
	return size
}

// keyInvalidated returns why a request's key was refused while the request ran; nil if it was not.
func keyInvalidated(ctx context.Context) error {
	if cause := context.Cause(ctx); errdefs.IsUnauthorized(cause) {
		return cause
	}
	return nil
}
