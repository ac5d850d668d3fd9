package gateway

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/rpcerr"
	"github.com/msbd/msbd/daemon/internal/token"
)

// exchange is one HTTP request on its way through the gateway.
type exchange struct {
	w      http.ResponseWriter
	r      *http.Request
	id     string
	began  time.Time
	caller token.Principal
}

// answer is what an exchange ends with. Nothing is sent before it is complete, so that a panic
// never leaves half an answer.
type answer struct {
	status int
	body   []byte
	allow  string // the methods of a path, for a 405
	// refused is why the request did not reach a method.
	refused error
}

var health = []byte(`{"message":"Service is healthy"}`)

// ServeHTTP answers one request.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := &exchange{w: w, r: r, id: rand.Text(), began: time.Now()}
	a := g.guarded(x)
	h := w.Header()
	h.Set("X-Request-Id", x.id)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	switch a.status {
	case http.StatusUnauthorized:
		h.Set("WWW-Authenticate", "Bearer")
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		h.Set("Retry-After", "1")
	case http.StatusMethodNotAllowed:
		h.Set("Allow", a.allow)
	}
	if a.body != nil {
		h.Set("Content-Type", "application/json")
	}
	w.WriteHeader(a.status)
	w.Write(a.body)
	if a.refused != nil {
		level := slog.LevelInfo
		if a.status == http.StatusInternalServerError {
			level = slog.LevelError
		}
		g.Log.Log(r.Context(), level, "request refused", "request_id", x.id, "source", r.RemoteAddr, "key_id", x.caller.KeyID,
			"status", a.status, "duration", time.Since(x.began), "err", a.refused)
	}
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
	if g.Dev {
		if err := g.checkBrowser(x.r); err != nil {
			return g.refuse(x, err)
		}
	}
	switch x.r.URL.Path {
	case rpc.HealthPath:
		if x.r.Method != http.MethodGet && x.r.Method != http.MethodHead {
			return g.notAllowed(x, "GET, HEAD")
		}
		return answer{status: http.StatusOK, body: health}
	case rpc.Path, rpc.StartPath, rpc.StopPath, rpc.RunCommandPath:
		if x.r.Method != http.MethodPost {
			return g.notAllowed(x, http.MethodPost)
		}
		return g.serveRPC(x)
	default:
		return g.refuseAs(x, http.StatusNotFound, "there is nothing at this path; requests go to "+rpc.Path)
	}
}

func (g *Gateway) serveRPC(x *exchange) answer {
	var err error
	if x.caller, err = g.authenticate(x.r); err != nil {
		return g.refuse(x, err)
	}
	if !g.inFlight.enter(x.caller.KeyID) {
		return g.refuse(x, fmt.Errorf("this key has %d requests in flight; wait for some to end: %w", maxInFlight, errdefs.ErrResourceExhausted))
	}
	defer g.inFlight.leave(x.caller.KeyID)
	if !isJSON(x.r.Header.Get("Content-Type")) {
		return g.refuseAs(x, http.StatusUnsupportedMediaType, "send the header Content-Type: application/json")
	}
	body, err := io.ReadAll(http.MaxBytesReader(x.w, x.r.Body, rpc.MaxBody))
	if err != nil {
		if _, tooLong := errors.AsType[*http.MaxBytesError](err); tooLong {
			return g.refuseAs(x, http.StatusRequestEntityTooLarge, fmt.Sprintf("a body holds at most %d bytes", rpc.MaxBody))
		}
		return g.refuseAs(x, http.StatusBadRequest, "the body could not be read to its end")
	}
	members, batch, bad := splitBatch(body)
	if bad != nil {
		return g.refuse(x, bad)
	}
	if !batch {
		res, status := g.respond(x, members[0], false)
		if res == nil {
			return answer{status: http.StatusNoContent}
		}
		return answer{status: status, body: encode(res)}
	}
	// In turn, in the order of the batch: a client may start a sandbox and use it in one.
	var responses []*rpc.Response
	for _, m := range members {
		if res, _ := g.respond(x, m, true); res != nil {
			responses = append(responses, res)
		}
	}
	if responses == nil {
		return answer{status: http.StatusNoContent}
	}
	return answer{status: http.StatusOK, body: encode(responses)}
}

// respond runs one request and makes its response, or none for a notification, and says which HTTP
// status the response has when it is alone.
func (g *Gateway) respond(x *exchange, raw jsontext.Value, batch bool) (*rpc.Response, int) {
	began := time.Now()
	status := http.StatusOK
	res := &rpc.Response{JSONRPC: rpc.Version, ID: jsontext.Value("null")}
	c := &call{caller: x.caller}
	var err error
	req, bad := parseRequest(raw)
	if req.ID != nil {
		res.ID = req.ID
	}
	if bad != nil {
		err = bad
	} else {
		res.Result, err = g.run(x.r.Context(), c, req)
	}
	level, attrs := slog.LevelInfo, []any{"request_id", x.id, "method", c.method, "key_id", x.caller.KeyID, "namespace", c.namespace}
	if err != nil {
		res.Error = rpcerr.JSONRPC(err, x.id)
		status = rpcerr.HTTPStatus(res.Error.Code)
		if res.Error.Code == rpc.CodeInternal {
			level = slog.LevelError
		}
		attrs = append(attrs, "err", err)
	}
	g.Log.Log(x.r.Context(), level, "call", append(attrs, "status", status, "duration", time.Since(began))...)

	// SDKs omit the id when they start a sandbox, and wait for the answer all the same.
	awaited := !batch && strings.HasPrefix(req.Method, "sandbox.")
	if bad == nil && req.ID == nil && !awaited {
		return nil, status
	}
	return res, status
}

// refuse answers a request that does not reach a method.
func (g *Gateway) refuse(x *exchange, err error) answer {
	e := rpcerr.JSONRPC(err, x.id)
	if e.Code == rpc.CodeUnauthenticated {
		e = errNoKey
	}
	return answer{status: rpcerr.HTTPStatus(e.Code), body: failure(e), refused: err}
}

// refuseAs answers what is wrong with the HTTP request rather than with what it asks.
func (g *Gateway) refuseAs(x *exchange, status int, message string) answer {
	e := &rpc.Error{Code: rpc.CodeInvalidRequest, Message: message}
	return answer{status: status, body: failure(e), refused: e}
}

func (g *Gateway) notAllowed(x *exchange, allow string) answer {
	a := g.refuseAs(x, http.StatusMethodNotAllowed, "this path takes "+allow)
	a.allow = allow
	return a
}

func failure(e *rpc.Error) []byte {
	return encode(&rpc.Response{JSONRPC: rpc.Version, Error: e, ID: jsontext.Value("null")})
}

// encode writes responses. Ids stay byte for byte as they came, escapes too.
func encode(v any) []byte {
	b, err := json.Marshal(v, jsontext.PreserveRawStrings(true), jsontext.AllowInvalidUTF8(true))
	if err != nil {
		panic(err) // every Value in a response was encoded or decoded by us
	}
	return b
}

func isJSON(contentType string) bool {
	if contentType == "application/json" {
		return true
	}
	kind, params, err := mime.ParseMediaType(contentType)
	charset, named := params["charset"]
	return err == nil && kind == "application/json" && (!named || strings.EqualFold(charset, "utf-8"))
}
