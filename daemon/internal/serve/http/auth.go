package http

import (
	"cmp"
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

// ErrNoKey is the one answer to a missing, malformed, expired, revoked or unknown key.
var ErrNoKey = &rpc.Error{
	Code:    rpc.CodeUnauthenticated,
	Message: "missing or invalid API key; send one in the header Authorization: Bearer KEY (the server's administrator makes them with: msb server keygen)",
}

// devPrincipal is everybody in dev mode.
var devPrincipal = keys.Principal{KeyID: "dev"}

// serveWithKey has an endpoint serve those who have a key for it, in the bounds of that key and for as long as the key is
// accepted.
func (g *Gateway) serveWithKey(c *Call, e *Endpoint, r *http.Request) error {
	var err error
	if c.Principal, err = g.authenticate(c, r); err != nil {
		return err
	}
	if !g.inFlight.Enter(c.Principal.KeyID) {
		return fmt.Errorf("this key has %d requests in flight; wait for some to end: %w", maxInFlight, errdefs.ErrResourceExhausted)
	}
	defer g.inFlight.Leave(c.Principal.KeyID)
	c.bucket = g.rates.Of(c.Principal.KeyID)
	if wait := c.bucket.Take(); wait > 0 {
		return &rpc.Error{
			Code:    rpc.CodeExhausted,
			Message: fmt.Sprintf("this key may make %g calls per second; wait %d s", g.RequestsPerSecond, wait),
			Data:    &rpc.ErrorData{RetryAfter: wait},
		}
	}
	if err := checkScope(c.Principal, e); err != nil {
		return err
	}
	switch e.Body.kind {
	case jsonBody:
		body := newBuffer()
		defer freeBuffer(body)
		if err := readJSON(body, c.response.ResponseWriter, r, e.Body.max); err != nil {
			return err
		}
		c.Body = body.Bytes()
	case streamBody:
		connection := http.NewResponseController(c.response.ResponseWriter)
		_ = connection.EnableFullDuplex() // else HTTP/1 reads the whole body before it sends anything
		r.Body = &deadlineBody{ReadCloser: http.MaxBytesReader(c.response.ResponseWriter, r.Body, e.Body.max), connection: connection, deadline: e.Deadline}
	}
	// Bind after reading the body, so that a key that was revoked during a slow upload starts nothing.
	ctx, cancel := c.Principal.Bind(r.Context())
	defer cancel()
	c.response.ctx = ctx
	began := time.Now()
	err = e.Serve(c, &c.response, r.WithContext(ctx))
	c.failed = err != nil
	// If the key was refused while the endpoint ran, discard what it wrote.
	if ended := keyInvalidated(ctx); ended != nil {
		return ended
	}
	if err == nil && e.Scope != PerCall { // those log their calls themselves
		c.log(r.Context(), c.path, "", cmp.Or(c.response.status, http.StatusOK), nil, time.Since(began), nil)
	}
	return err
}

// authenticate returns whom a request speaks for. Its error is for the log: the client is told no cause.
func (g *Gateway) authenticate(c *Call, r *http.Request) (keys.Principal, error) {
	if g.Dev {
		return devPrincipal, nil
	}
	key := apiKey(r.Header)
	if key == "" {
		return keys.Principal{}, ErrNoKey
	}
	from := sourceNet(c.client)
	if !g.badKeys.allow(from, key) {
		return keys.Principal{}, errTooManyBadKeys
	}
	p, err := g.Verifier.Verify(key, c.client)
	if errdefs.IsUnauthorized(err) {
		g.badKeys.count(from)
	}
	return p, err
}

// credential is the API key in the headers, with or without its scheme. Proxy-Authorization wins
// when it is present, even when it is of no use: which header counts must not depend on what is in
// it. The same holds for a header that is there twice.
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

// checkScope checks that a principal may use an endpoint. Its error is errdefs.ErrPermissionDenied.
func checkScope(p keys.Principal, e *Endpoint) error {
	switch {
	case e.Scope == PerCall:
		return nil
	case e.WholeServer && (!p.Has(e.Scope) || len(p.Namespaces) > 0):
		return fmt.Errorf("this needs a key with the scope %s that is not limited to namespaces: %w", e.Scope, errdefs.ErrPermissionDenied)
	case !p.Has(e.Scope):
		return fmt.Errorf("this needs a key with the scope %s: %w", e.Scope, errdefs.ErrPermissionDenied)
	}
	return nil
}

// readJSON reads a whole body of JSON.
func readJSON(body io.ReaderFrom, w http.ResponseWriter, r *http.Request, max int64) error {
	if !isJSON(r.Header.Get("Content-Type")) {
		return newRefusal(http.StatusUnsupportedMediaType, "send the header Content-Type: application/json")
	}
	_, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, max))
	if _, tooLong := errors.AsType[*http.MaxBytesError](err); tooLong {
		return newRefusal(http.StatusRequestEntityTooLarge, fmt.Sprintf("a body holds at most %d bytes", max))
	}
	if err != nil {
		return newRefusal(http.StatusBadRequest, "the body could not be read to its end")
	}
	return nil
}

func isJSON(contentType string) bool {
	if contentType == "application/json" {
		return true
	}
	kind, params, err := mime.ParseMediaType(contentType)
	charset, named := params["charset"]
	return err == nil && kind == "application/json" && (!named || strings.EqualFold(charset, "utf-8"))
}

// deadlineBody is a body of which each piece must arrive in time.
type deadlineBody struct {
	io.ReadCloser
	connection *http.ResponseController
	deadline   time.Duration
	ended      error // of the last Read: after it, net/http watches the connection, without a deadline
}

func (b *deadlineBody) Read(p []byte) (int, error) {
	if b.ended != nil {
		return 0, b.ended
	}
	_ = b.connection.SetReadDeadline(time.Now().Add(b.deadline)) // tests' writers need not support it
	n, err := b.ReadCloser.Read(p)
	b.ended = err
	return n, err
}
