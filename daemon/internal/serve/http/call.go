package http

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
)

// Mount has h serve the POSTs to a path, behind the same door as every other route. It must not be called
// after Serve.
//
// h gets a body that is strict JSON, one message or a batch of some, and calls methods with [Gateway.Call]
// in the context of its request. What h writes is kept until it returns, and reaches nobody if the key has
// ended by then. Only from a Flush on it is sent as it comes. An error that h tells in plain text is sent
// in the envelope of JSON-RPC.
func (g *Gateway) Mount(path string, h http.Handler) {
	g.routes[path] = route{methods: []string{http.MethodPost}, serve: func(ctx context.Context, x *exchange) answer {
		return g.serveMounted(ctx, x, h)
	}}
}

// Call calls a method of the table with named params, for whoever made the request that ctx is from: one
// to a handler that was mounted. It ends when ctx does, and also when that client leaves or its key ends,
// whatever a library has made of ctx on the way. The calls of one request run one at a time.
func (g *Gateway) Call(ctx context.Context, method string, params jsontext.Value) (jsontext.Value, *rpc.Error) {
	v, ok := ctx.Value(visitKey{}).(*visit)
	if !ok {
		return nil, errNoKey
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(v.accepted, func() { cancel(context.Cause(v.accepted)) })()
	select {
	case v.turn <- struct{}{}:
		defer func() { <-v.turn }()
	case <-ctx.Done(): // run says why
	}
	req := parsedRequest{Request: rpc.Request{JSONRPC: rpc.Version, Method: method, Params: params}}
	if params != nil && params.Kind() != '{' {
		req.bad = invalidParams("params must be an object")
	}
	result, failed := g.invoke(ctx, v.x, req)
	// What a handler came to in spite of its end goes to nobody.
	if errdefs.IsUnauthorized(context.Cause(v.accepted)) {
		return nil, errNoKey
	}
	return result, failed
}

// Caller is the id of the key for which Call would call. It is empty if there is none.
func (g *Gateway) Caller(ctx context.Context) string {
	if v, ok := ctx.Value(visitKey{}).(*visit); ok {
		return v.x.caller.KeyID
	}
	return ""
}

// Schemas are the JSON Schemas of a method's params, as an object, and of its result. They are nil if
// there is no such method.
func (g *Gateway) Schemas(name string) (params, result jsontext.Value) {
	m, ok := g.methods[name]
	if !ok {
		return nil, nil
	}
	encode := func(s schema) jsontext.Value {
		b, err := json.Marshal(s, json.Deterministic(true))
		if err != nil {
			panic(err) // made of our own types alone
		}
		return b
	}
	return encode(m.paramsSchema()), encode(schemaOf(m.result))
}

// visit is a request to a mounted handler, on its way through code that is not ours.
type visit struct {
	x *exchange
	// accepted ends when the client leaves or its key ends. It is kept here because libraries detach what
	// they run from the context of the request.
	accepted context.Context
	turn     chan struct{} // holds one while a call runs
}

type visitKey struct{}

func (g *Gateway) serveMounted(ctx context.Context, x *exchange, h http.Handler) answer {
	n, bad := countMessages(x.in.Bytes())
	if bad != nil {
		a := g.refuse(x, bad)
		a.refused = errBadBody
		return a
	}
	oweCalls(x.bucket, n-1)
	r := x.r.WithContext(context.WithValue(x.r.Context(), visitKey{}, &visit{x: x, accepted: ctx, turn: make(chan struct{}, 1)}))
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(x.in.Bytes())), int64(x.in.Len())
	w := &mountedWriter{g: g, x: x, header: http.Header{}}
	h.ServeHTTP(w, r)
	a := w.answer()
	if a.status >= http.StatusBadRequest && !isJSON(a.header.Get("Content-Type")) {
		a = g.refuseAs(x, a.status, shorten(strings.TrimSpace(x.out.String())))
		a.refused = errMounted
	}
	return a
}

var errMounted = errors.New("what is mounted at this path does not take it")

// countMessages reads a whole body as strict JSON, and says how many messages it holds.
func countMessages(body []byte) (n int, bad *rpc.Error) {
	if depth(body) > rpc.MaxDepth {
		return 0, parseError(fmt.Errorf("nested deeper than %d levels", rpc.MaxDepth))
	}
	p := newParser(body)
	defer p.free()
	batch := p.PeekKind() == '['
	if batch {
		p.ReadToken()
	}
	for !batch && n == 0 || batch && p.PeekKind() != ']' {
		if _, err := p.value(); err != nil {
			return 0, parseError(err)
		}
		n++
	}
	if batch {
		p.ReadToken()
	}
	switch _, err := p.ReadToken(); {
	case err == nil:
		return 0, parseError(errors.New("the body holds more than one JSON value"))
	case err != io.EOF:
		return 0, parseError(err)
	case n == 0 || n > rpc.MaxBatch:
		return 0, invalidRequest("a batch must hold 1 to %d requests", rpc.MaxBatch)
	}
	return n, nil
}

// mountedWriter keeps what a mounted handler writes until it flushes. The handler must not use it after
// it has returned, nor at the same time from several goroutines.
type mountedWriter struct {
	g      *Gateway
	x      *exchange
	header http.Header
	status int
}

func (w *mountedWriter) Header() http.Header { return w.header }

func (w *mountedWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
}

func (w *mountedWriter) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	if !w.x.sent {
		return w.x.out.Write(p)
	}
	_ = http.NewResponseController(w.x.w).SetWriteDeadline(time.Now().Add(w.g.answerTimeout))
	return w.x.w.Write(p)
}

// FlushError is what http.ResponseController calls.
func (w *mountedWriter) FlushError() error {
	w.WriteHeader(http.StatusOK)
	if !w.x.sent {
		a := w.answer()
		w.g.begin(w.x, a)
		if _, err := w.x.w.Write(a.body); err != nil {
			return err
		}
	}
	return http.NewResponseController(w.x.w).Flush()
}

// answer is what was written up to now. The headers that every answer has are the gateway's.
func (w *mountedWriter) answer() answer {
	w.WriteHeader(http.StatusOK)
	w.header.Del("Cache-Control")
	w.header.Del("Connection")
	return answer{status: w.status, header: w.header, body: w.x.out.Bytes()}
}
