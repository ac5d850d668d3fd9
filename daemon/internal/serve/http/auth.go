package http

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// ErrNoKey is the error that a client gets for a missing, malformed, expired, revoked or unknown key. It is the same in
// all cases, so that it reveals nothing about the key.
var ErrNoKey = &rpc.Error{
	Code:    rpc.CodeUnauthenticated,
	Message: "missing or invalid API key; send one in the header Authorization: Bearer KEY (the server's administrator creates keys with: msb server keygen)",
}

// devPrincipal is the principal of every request in dev mode.
var devPrincipal = keys.Principal{KeyID: "dev"}

// serveWithKey serves a request to an endpoint that needs an API key. It authenticates the request, applies the limits
// of the key and checks its scope before it calls the endpoint. If the key is revoked or expires meanwhile, the
// endpoint's context ends and its result is discarded.
func (g *Gateway) serveWithKey(c *Call, e *Endpoint, r *http.Request) error {
	if e.Body.kind == streamBody {
		c.upload = newDeadlineBody(c, e, r)
	}
	var err error
	if c.Principal, err = g.authenticate(c, r); err != nil {
		return err
	}
	c.turn.key = c.Principal.KeyID
	if !g.inFlight.Enter(c.Principal.KeyID) {
		return fmt.Errorf("this key has %d requests in progress; wait until some of them finish: %w", maxInFlight, errdefs.ErrResourceExhausted)
	}
	c.inFlight = true
	c.bucket = g.rates.Of(c.Principal.KeyID)
	if wait := c.bucket.Take(); wait > 0 {
		return &rpc.Error{
			Code:    rpc.CodeExhausted,
			Message: fmt.Sprintf("the rate limit of this key is %g calls/s; try again in %d s", g.RequestsPerSecond, wait),
			Data:    &rpc.ErrorData{RetryAfter: wait},
		}
	}
	if err := checkScope(c.Principal, e); err != nil {
		return err
	}
	if c.endOnConnection, err = g.connections.begin(r.Context(), c.Principal.KeyID); err != nil {
		return err
	}
	if e.WebSocket {
		if err := checkHandshake(r); err != nil {
			return err
		}
	}
	if e.Body.kind == jsonBody {
		if !isJSON(r.Header.Get("Content-Type")) {
			return newRefusal(http.StatusUnsupportedMediaType, "send the header Content-Type: application/json")
		}
		size, known := min(r.ContentLength, e.Body.max), r.ContentLength >= 0
		if !known {
			size = e.Body.max
		}
		if err := c.holdBody(int(size)); err != nil {
			return err
		}
		body := newBuffer()
		defer freeBuffer(body)
		if known {
			body.Grow(int(size) + bytes.MinRead) // so that ReadFrom need not enlarge it
		}
		if err := readBody(body, c.response.ResponseWriter, r, e.Body.max); err != nil {
			return err
		}
		if err := c.holdBody(body.Len()); err != nil { // never fails, because it is not longer than was announced
			return err
		}
		c.takeTurnsIfLarge(c.bodyBytes)
		c.Body = body.Bytes()
	}
	// Bind after reading the body, so that a key revoked during a slow upload starts no call.
	ctx, cancel := c.Principal.Bind(r.Context())
	defer cancel()
	c.response.ctx = ctx
	r = r.WithContext(ctx)
	if c.upload != nil {
		c.upload.ctx = ctx
		r.Body = c.upload // in the copy, because net/http needs the original to decide whether to use the connection again
	}
	began := time.Now()
	err = c.work(e, r)
	c.failed = err != nil
	// If the key was revoked or expired while the endpoint ran, discard what it wrote.
	if cause := keyRejection(ctx); cause != nil {
		return cause
	}
	if err == nil && e.Scope != PerCall { // PerCall endpoints log each of their calls themselves
		c.log(r.Context(), c.path, c.namespaces, cmp.Or(c.response.status, http.StatusOK), nil, time.Since(began), nil)
	}
	return err
}

// work serves a request, from now on with a turn if it is large.
func (c *Call) work(e *Endpoint, r *http.Request) error {
	c.turn.resume()
	defer c.turn.pause() // also if Serve panics
	return e.Serve(c, &c.response, r)
}

// authenticate returns the principal of a request. Its error is for the log only: the client gets ErrNoKey, without the
// cause.
func (g *Gateway) authenticate(c *Call, r *http.Request) (keys.Principal, error) {
	if g.Dev {
		return devPrincipal, nil
	}
	key := apiKey(r.Header)
	if c.endpoint.WebSocket && r.Header["Authorization"] == nil && r.Header["Proxy-Authorization"] == nil {
		key = handshakeKey(r.Header)
	}
	if key == "" {
		return keys.Principal{}, ErrNoKey
	}
	return g.Verifier.Verify(key, c.client)
}

// apiKey returns the API key in the headers, or "" if there is none. The scheme Bearer is optional. If
// Proxy-Authorization is present, Authorization is ignored, even if the value of Proxy-Authorization is invalid:
// the contents of a header must not decide which header counts. A header that occurs twice is invalid.
func apiKey(h http.Header) string {
	values := h["Proxy-Authorization"]
	if values == nil {
		values = h["Authorization"]
	}
	if len(values) != 1 {
		return ""
	}
	scheme, key, found := strings.Cut(values[0], " ")
	if !found {
		return scheme
	}
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimLeft(key, " ")
}

// checkScope checks that a principal may use an endpoint. If not, the error is errdefs.ErrPermissionDenied.
func checkScope(p keys.Principal, e *Endpoint) error {
	switch {
	case e.Scope == PerCall:
		return nil
	case e.WholeServer && (!p.Has(e.Scope) || len(p.Namespaces) > 0):
		return fmt.Errorf("this path needs a key with the scope %s that is not limited to namespaces: %w", e.Scope, errdefs.ErrPermissionDenied)
	case !p.Has(e.Scope):
		return fmt.Errorf("this path needs a key with the scope %s: %w", e.Scope, errdefs.ErrPermissionDenied)
	}
	return nil
}

// readBody reads the complete body of a request, of at most max bytes, into body. It is not parsed.
func readBody(body io.ReaderFrom, w http.ResponseWriter, r *http.Request, max int64) error {
	_, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, max))
	if _, tooLong := errors.AsType[*http.MaxBytesError](err); tooLong {
		return newRefusal(http.StatusRequestEntityTooLarge, fmt.Sprintf("the body exceeds the limit of %d bytes", max))
	}
	if err != nil {
		return errIncompleteBody
	}
	return nil
}

var errIncompleteBody = newRefusal(http.StatusBadRequest, "the body could not be read completely; it is malformed, cut off or too slow")

// isJSON reports whether a Content-Type header declares JSON in UTF-8.
func isJSON(contentType string) bool {
	if contentType == "application/json" {
		return true
	}
	mediaType, params, err := mime.ParseMediaType(contentType)
	charset, ok := params["charset"]
	return err == nil && mediaType == "application/json" && (!ok || strings.EqualFold(charset, "utf-8"))
}

// deadlineBody is a request body in which each Read must complete within timeout, and before ctx ends. Its errors other than
// io.EOF are those that the client should get.
type deadlineBody struct {
	io.ReadCloser
	ctx     context.Context
	call    *Call
	conn    *http.ResponseController
	timeout time.Duration
	http1   bool
	// err is the error that ended the body. From then on, Read sets no more deadlines, because net/http reads from
	// the connection in the background to notice when the client disconnects.
	err error
}

func newDeadlineBody(c *Call, e *Endpoint, r *http.Request) *deadlineBody {
	w := c.response.ResponseWriter
	conn := http.NewResponseController(w)
	_ = conn.EnableFullDuplex() // otherwise HTTP/1 would read the entire body before it sends anything
	return &deadlineBody{
		ReadCloser: http.MaxBytesReader(w, r.Body, e.Body.max), ctx: r.Context(), call: c, conn: conn, timeout: e.Deadline,
		http1: r.ProtoMajor == 1,
	}
}

// endsConnection reports whether a response that is sent now must be the last on its connection. With HTTP/1, it must be if
// the rest of the body was not read: net/http would take that for the next request.
func (b *deadlineBody) endsConnection() bool { return b != nil && b.http1 && b.err != io.EOF }

func (b *deadlineBody) Read(p []byte) (n int, err error) {
	if b.err != nil {
		return 0, b.err
	}
	_ = b.conn.SetReadDeadline(time.Now().Add(b.timeout)) // the ResponseWriter of a test may not support deadlines
	stop := context.AfterFunc(b.ctx, func() { _ = b.conn.SetReadDeadline(time.Now()) })
	b.call.Wait(func() { n, b.err = b.ReadCloser.Read(p) })
	stop()
	if _, tooLong := errors.AsType[*http.MaxBytesError](b.err); b.err == nil || b.err == io.EOF || tooLong {
		return n, b.err
	}
	// If the client has closed the connection, net/http may have canceled the context before.
	if cause := context.Cause(b.ctx); cause == nil || cause == context.Canceled {
		b.err = errIncompleteBody
	} else {
		b.err = cause
	}
	return n, b.err
}
