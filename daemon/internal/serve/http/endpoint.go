package http

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// Endpoint is one route. The Gateway authenticates, limits, counts and logs its requests; Serve does the rest.
type Endpoint struct {
	// Pattern is one of http.ServeMux with a method: "GET /api/v1/sandboxes/{name}/files/{path...}". GET includes
	// HEAD.
	Pattern string
	// Scope is what the key must have: one of keys.Scopes, or Open or PerCall. The server does not start with an
	// endpoint that has none.
	Scope keys.Scope
	// WholeServer says that the endpoint is about all tenant namespaces: a key that is limited to some is refused.
	WholeServer bool
	// Body says what becomes of the request's body.
	Body Body
	// Deadline bounds how long the client may take to accept each write of the response. The server does not start
	// with an endpoint that has none.
	Deadline time.Duration
	// Serve answers a request. It runs in a context that ends when the client leaves, the key is refused or the
	// server has stopped. If it returns an error before anything was sent, the client gets the error in the envelope
	// of JSON-RPC, with the HTTP status of the error's class, and nothing of what was written to w.
	//
	// w keeps what is written to it until Serve returns, so that nobody gets half a response, or the result of a key
	// that was revoked meanwhile. From the first Flush on, it sends each write at once, and an
	// error of Serve cuts the response off, so that the client does not take it for complete. It can be hijacked: then Serve
	// owns the connection until it returns. Use w from one goroutine at a time, and not after Serve has returned.
	Serve func(c *Call, w http.ResponseWriter, r *http.Request) error
}

const (
	// Open endpoints need no API key.
	Open keys.Scope = "-open"
	// PerCall endpoints take every live key: they check the scope of each of the calls that a request makes.
	PerCall keys.Scope = "-per-call"
)

// AnswerDeadline is the Deadline of endpoints whose clients wait for the response.
const AnswerDeadline = 60 * time.Second

// Body is a rule for the bodies of an endpoint's requests. The zero Body ignores them.
type Body struct {
	kind bodyKind
	max  int64
}

type bodyKind int

const (
	noBody bodyKind = iota
	jsonBody
	streamBody
)

// JSON is a body of type application/json of at most max bytes. It is read before Serve is called, to [Call.Body], and
// must have arrived within 30 seconds of the request's first byte.
func JSON(max int64) Body { return Body{jsonBody, max} }

// Stream is a body of any type and of at most max bytes, which Serve reads from the request. Each piece must arrive
// within the endpoint's Deadline.
func Stream(max int64) Body { return Body{streamBody, max} }

// path is the pattern without its method.
func (e Endpoint) path() string {
	_, path, _ := strings.Cut(e.Pattern, " ")
	return path
}

// handle adds an endpoint to the routes.
func (g *Gateway) handle(e Endpoint) (err error) {
	switch method, path, _ := strings.Cut(e.Pattern, " "); {
	case method == "" || method != strings.ToUpper(method) || !strings.HasPrefix(path, "/"):
		return fmt.Errorf("endpoint %q: the pattern must be a method, a space and a path", e.Pattern)
	case e.Scope == "":
		return fmt.Errorf("endpoint %q has no scope: anyone could use it", e.Pattern)
	case e.Scope != Open && e.Scope != PerCall && !slices.Contains(keys.Scopes, e.Scope):
		return fmt.Errorf("endpoint %q: no key can have the scope %q", e.Pattern, e.Scope)
	case e.WholeServer && (e.Scope == Open || e.Scope == PerCall):
		return fmt.Errorf("endpoint %q: WholeServer needs a scope of its own", e.Pattern)
	case e.Scope == Open && e.Body != (Body{}):
		return fmt.Errorf("endpoint %q: an open endpoint takes no body", e.Pattern)
	case e.Deadline <= 0:
		return fmt.Errorf("endpoint %q has no deadline: a client that accepts no response would keep its place", e.Pattern)
	case e.Serve == nil:
		return fmt.Errorf("endpoint %q serves nothing", e.Pattern)
	}
	defer func() {
		if v := recover(); v != nil { // ServeMux, about a bad pattern or a conflict
			err = fmt.Errorf("endpoint %q: %v", e.Pattern, v)
		}
	}()
	path := e.path()
	g.mux.HandleFunc(e.Pattern, func(w http.ResponseWriter, r *http.Request) {
		w.(*response).call.serve(&e, path, r)
	})
	return nil
}

var healthEndpoint = Endpoint{
	Pattern: "GET " + rpc.HealthPath, Scope: Open, Deadline: AnswerDeadline,
	Serve: func(_ *Call, w http.ResponseWriter, _ *http.Request) error {
		_, err := w.Write(healthBody)
		return err
	},
}

var healthBody = []byte(`{"message":"Service is healthy"}`)
