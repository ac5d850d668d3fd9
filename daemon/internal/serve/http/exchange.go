package http

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"mime"
	"net/http"
	"net/netip"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/time/rate"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
)

// maxHeader bounds the bytes of a request's line and headers.
const maxHeader = 16 << 10

// exchange is one HTTP request on its way through the gateway.
type exchange struct {
	w      http.ResponseWriter
	r      *http.Request
	id     string
	began  time.Time
	client netip.Addr // whose request it is, behind trusted proxies, too; not valid if it cannot be told
	path   string     // as in the table of routes, or unknownPath
	caller keys.Principal
	bucket *rate.Limiter // of the caller
	sent   bool          // the status and the headers, at least
	// in and out are for the bodies. They come from a pool, and go back to it when all is written.
	in, out *bytes.Buffer
	// kept and answered are for outputs alone.
	kept     int
	answered bool
}

// answer is what an exchange ends with. Nothing is sent before it is complete, so that a panic
// never leaves half an answer.
type answer struct {
	status int
	header http.Header // beside those of every answer; may be nil
	body   []byte
	// refused is why the request did not reach a method.
	refused error
}

// route is what there is at a path. It needs an API key unless it is open.
type route struct {
	methods []string
	open    bool
	// scope is what the key needs for the route as a whole, which is then about the whole server: the key
	// must not be limited to namespaces. Empty: each call has its own.
	scope keys.Scope
	serve func(context.Context, *exchange) answer
}

func (g *Gateway) routeTable() map[string]route {
	get, post := []string{http.MethodGet, http.MethodHead}, []string{http.MethodPost}
	calls := route{methods: post, serve: g.serveRPC}
	return map[string]route{
		rpc.HealthPath:     {methods: get, open: true, serve: serveHealth},
		rpc.MetricsPath:    {methods: get, scope: keys.ScopeMetrics, serve: g.serveMetrics},
		rpc.Path:           calls,
		rpc.StartPath:      calls,
		rpc.StopPath:       calls,
		rpc.RunCommandPath: calls,
	}
}

// The headers that answers share are values, which nobody changes.
var (
	headerJSON    = []string{"application/json"}
	headerNoSniff = []string{"nosniff"}
	headerNoStore = []string{"no-store"}
)

// ServeHTTP answers one request.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := &exchange{w: w, r: r, id: rand.Text(), began: time.Now(), client: g.clientOf(r), path: unknownPath, in: newBuffer(), out: newBuffer()}
	defer freeBuffer(x.in)
	g.measures.inFlight.Inc()
	defer g.measures.inFlight.Dec()
	a := g.guarded(x)
	defer g.outputs.release(x)
	if !x.sent {
		g.begin(x, a)
		if _, err := w.Write(a.body); err == nil {
			freeBuffer(x.out) // HTTP/2 may still read from it after a write that failed
		}
	}
	g.measures.request(x.path, a.status)
	if a.refused != nil {
		g.logRefused(x, a)
	}
}

// begin sends the status and the headers of an answer.
func (g *Gateway) begin(x *exchange, a answer) {
	x.sent = true
	h := x.w.Header()
	h["X-Request-Id"] = []string{x.id}
	h["X-Content-Type-Options"] = headerNoSniff
	h["Cache-Control"] = headerNoStore
	if a.body != nil {
		h["Content-Type"] = headerJSON
	}
	for name, values := range a.header {
		h[name] = values
	}
	// Not the server's WriteTimeout, which would count the run. Tests' writers need not support it.
	_ = http.NewResponseController(x.w).SetWriteDeadline(time.Now().Add(g.answerTimeout))
	x.w.WriteHeader(a.status)
}

func (g *Gateway) logRefused(x *exchange, a answer) {
	level := slog.LevelInfo
	switch {
	case a.status == http.StatusInternalServerError:
		level = slog.LevelError
	case errors.Is(a.refused, errTooManyTries):
		level = slog.LevelDebug
	case x.caller.KeyID == "" && !g.refusals.Allow():
		// A flood that does no harm here must not fill the disk either: it is counted by the metrics.
		level = slog.LevelDebug
	}
	g.Log.LogAttrs(x.r.Context(), level, "request refused",
		slog.String("request_id", x.id), slog.String("path", x.path), slog.String("key_id", x.caller.KeyID),
		slog.String("source", x.source()), slog.Int("status", a.status),
		slog.Duration("duration", time.Since(x.began)), slog.Any("err", a.refused))
}

// guarded turns a panic into the answer to an unforeseen error.
func (g *Gateway) guarded(x *exchange) (a answer) {
	defer func() {
		if v := recover(); v != nil {
			a = g.refuse(x, fmt.Errorf("panic: %v\n%s", v, debug.Stack()))
		}
	}()
	return g.serve(x)
}

func (g *Gateway) serve(x *exchange) answer {
	if headerSize(x.r) > maxHeader {
		return g.refuseAs(x, http.StatusRequestHeaderFieldsTooLarge, fmt.Sprintf("headers hold at most %d bytes", maxHeader))
	}
	if g.Dev {
		if err := g.checkBrowser(x.r); err != nil {
			return g.refuse(x, err)
		}
	}
	at, ok := g.routes[x.r.URL.Path]
	if !ok {
		return g.refuseAs(x, http.StatusNotFound, "there is nothing at this path; requests go to "+rpc.Path)
	}
	x.path = x.r.URL.Path
	if !slices.Contains(at.methods, x.r.Method) {
		allow := strings.Join(at.methods, ", ")
		a := g.refuseAs(x, http.StatusMethodNotAllowed, "this path takes "+allow)
		a.header = http.Header{"Allow": {allow}}
		return a
	}
	if at.open {
		return at.serve(x.r.Context(), x)
	}
	return g.behindKey(x, at)
}

// source is where a request came from, for the log: with the port, unless a proxy passed it on.
func (x *exchange) source() string {
	if addr := clientAddr(x.r.RemoteAddr); addr == x.client {
		return x.r.RemoteAddr
	}
	return x.client.String()
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

var health = []byte(`{"message":"Service is healthy"}`)

func serveHealth(context.Context, *exchange) answer {
	return answer{status: http.StatusOK, body: health}
}

func (g *Gateway) serveRPC(ctx context.Context, x *exchange) answer {
	requests, batch, bad := parseBody(x.in.Bytes())
	if bad != nil {
		a := g.refuse(x, bad)
		a.refused = errBadBody // bad may quote it, and this is for the log
		return a
	}
	oweCalls(x.bucket, len(requests)-1)
	if !batch {
		req := requests[0]
		failed := g.respond(ctx, x, req)
		switch {
		// SDKs omit the id when they start a sandbox, and wait for the answer all the same.
		case req.ID == nil && !strings.HasPrefix(req.Method, "sandbox."):
			return answer{status: http.StatusNoContent}
		case failed != nil:
			return failure(rpcerr.HTTPStatus(failed.Code), failed, x.out.Bytes())
		}
		return answer{status: http.StatusOK, body: x.out.Bytes()}
	}
	// In turn, in the order of the batch: a client may start a sandbox and use it in one.
	separator := byte('[')
	for _, req := range requests {
		end := x.out.Len()
		x.out.WriteByte(separator)
		if g.respond(ctx, x, req); req.ID == nil {
			x.out.Truncate(end)
		} else {
			separator = ','
		}
	}
	if separator == '[' {
		return answer{status: http.StatusNoContent}
	}
	x.out.WriteByte(']')
	return answer{status: http.StatusOK, body: x.out.Bytes()}
}

var errBadBody = errors.New("the body is not strict JSON, or holds no calls or too many")

// readBody reads a whole body of JSON into x.in; or it has an answer.
func (g *Gateway) readBody(x *exchange) (refused answer, ok bool) {
	if !isJSON(x.r.Header.Get("Content-Type")) {
		return g.refuseAs(x, http.StatusUnsupportedMediaType, "send the header Content-Type: application/json"), false
	}
	_, err := x.in.ReadFrom(http.MaxBytesReader(x.w, x.r.Body, rpc.MaxBody))
	if err == nil {
		return answer{}, true
	}
	if _, tooLong := errors.AsType[*http.MaxBytesError](err); tooLong {
		return g.refuseAs(x, http.StatusRequestEntityTooLarge, fmt.Sprintf("a body holds at most %d bytes", rpc.MaxBody)), false
	}
	return g.refuseAs(x, http.StatusBadRequest, "the body could not be read to its end"), false
}

// respond runs one request, if it is one, and writes the response to x.out.
func (g *Gateway) respond(ctx context.Context, x *exchange, req parsedRequest) (failed *rpc.Error) {
	result, failed := g.invoke(ctx, x, req)
	writeResponse(x.out, result, failed, req.ID)
	return failed
}

// invoke runs one request, if it is one, and logs and counts the call.
func (g *Gateway) invoke(ctx context.Context, x *exchange, req parsedRequest) (result jsontext.Value, failed *rpc.Error) {
	began := time.Now()
	c := &call{caller: x.caller, method: unknownMethod}
	result, err := g.run(g.withKeeper(ctx, x), c, req)
	took := time.Since(began)
	if err != nil {
		failed = rpcerr.JSONRPC(err, x.id)
	}
	g.measures.call(c.method, failed, took)
	g.logCall(x, c, failed, took, err)
	return result, failed
}

// logCall writes a line of the access log. What a client sent is not in it: of errors that may quote
// that, there is only the code.
func (g *Gateway) logCall(x *exchange, c *call, failed *rpc.Error, took time.Duration, cause error) {
	status, level := http.StatusOK, slog.LevelInfo
	if failed != nil {
		status = rpcerr.HTTPStatus(failed.Code)
		if failed.Code == rpc.CodeInternal {
			level = slog.LevelError
		}
	}
	if !g.Log.Enabled(x.r.Context(), level) {
		return
	}
	attrs := append(make([]slog.Attr, 0, 10), slog.String("request_id", x.id), slog.String("method", c.method),
		slog.String("namespace", c.namespace), slog.String("key_id", x.caller.KeyID), slog.String("source", x.source()),
		slog.Int("status", status), slog.Duration("duration", took))
	if failed != nil {
		attrs = append(attrs, slog.Int("code", int(failed.Code)))
		switch failed.Code {
		case rpc.CodeInternal, rpc.CodeUnavailable, rpc.CodeExhausted, rpc.CodePermissionDenied, rpc.CodeUnauthenticated:
			attrs = append(attrs, slog.Any("err", cause))
		}
	}
	g.Log.LogAttrs(x.r.Context(), level, "call", attrs...)
}

// refuse answers a request that does not reach a method.
func (g *Gateway) refuse(x *exchange, err error) answer {
	e := rpcerr.JSONRPC(err, x.id)
	if e.Code == rpc.CodeUnauthenticated {
		e = errNoKey
		g.measures.authFailures.Inc()
	}
	return x.refuse(rpcerr.HTTPStatus(e.Code), e, err)
}

// refuseAs answers what is wrong with the HTTP request rather than with what it asks.
func (g *Gateway) refuseAs(x *exchange, status int, message string) answer {
	e := &rpc.Error{Code: rpc.CodeInvalidRequest, Message: message}
	return x.refuse(status, e, e)
}

func (x *exchange) refuse(status int, e *rpc.Error, cause error) answer {
	x.out.Reset() // of what was run when the key ended
	writeResponse(x.out, nil, e, nil)
	a := failure(status, e, x.out.Bytes())
	a.refused = cause
	return a
}

// failure is the answer that carries only an error.
func failure(status int, e *rpc.Error, body []byte) answer {
	a := answer{status: status, body: body}
	switch status {
	case http.StatusUnauthorized:
		a.header = http.Header{"Www-Authenticate": {"Bearer"}}
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		if e.Data != nil && e.Data.RetryAfter > 0 {
			a.header = http.Header{"Retry-After": {strconv.Itoa(e.Data.RetryAfter)}}
		}
	}
	return a
}

var null = jsontext.Value("null")

// writeResponse writes an rpc.Response. The id stays byte for byte as it came.
func writeResponse(b *bytes.Buffer, result jsontext.Value, failed *rpc.Error, id jsontext.Value) {
	b.WriteString(`{"jsonrpc":"2.0",`)
	if failed == nil {
		b.WriteString(`"result":`)
		b.Write(result)
	} else {
		b.WriteString(`"error":`)
		// What is in a message may be what a client sent.
		if err := json.MarshalWrite(b, failed, jsontext.AllowInvalidUTF8(true)); err != nil {
			panic(err) // a struct of strings and numbers
		}
	}
	if id == nil {
		id = null
	}
	b.WriteString(`,"id":`)
	b.Write(id)
	b.WriteByte('}')
}

// buffers are for bodies.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

func newBuffer() *bytes.Buffer { return buffers.Get().(*bytes.Buffer) }

// maxKept is how large a buffer may be to be kept for other requests.
const maxKept = 64 << 10

func freeBuffer(b *bytes.Buffer) {
	if b.Cap() <= maxKept {
		b.Reset()
		buffers.Put(b)
	}
}

func isJSON(contentType string) bool {
	if contentType == "application/json" {
		return true
	}
	kind, params, err := mime.ParseMediaType(contentType)
	charset, named := params["charset"]
	return err == nil && kind == "application/json" && (!named || strings.EqualFold(charset, "utf-8"))
}
