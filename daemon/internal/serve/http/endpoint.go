package http

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// Endpoint is one route. The Gateway authenticates, limits, counts and logs its requests; Serve does the rest.
type Endpoint struct {
	// Pattern is a pattern of http.ServeMux with a method, such as
	// "GET /api/v1/sandboxes/{name}/files/{path...}". GET includes HEAD.
	Pattern string
	// Scope is the scope that the API key must have: one of keys.Scopes, Open or PerCall. It is required: New fails
	// without it.
	Scope keys.Scope
	// WholeServer means that the endpoint concerns all tenant namespaces. A key that is limited to some namespaces is
	// refused.
	WholeServer bool
	// Body is the rule for the request's body.
	Body Body
	// WebSocket means that Serve answers the handshake of a WebSocket. Requests without a handshake are refused. Because
	// the programs in web pages cannot set headers, the handshake may have the API key in Sec-WebSocket-Protocol.
	WebSocket bool
	// Deadline is how long the client may take to accept each write of the response. It is required: New fails
	// without it.
	Deadline time.Duration
	// Serve responds to a request. The context of r ends when the client disconnects, when the key is revoked or
	// expires, and when the server stops. If Serve returns an error before anything was sent, what it wrote to w is
	// discarded; the client gets a JSON-RPC error with the HTTP status of the error's class.
	//
	// w buffers the response until Serve returns, so that no client gets a partial response, or a result after its
	// key was revoked. After the first Flush, w sends each write at once. If Serve then returns an error, the response
	// is aborted, so that the client notices that it is incomplete. Serve may hijack the connection, which is closed
	// when Serve returns, and half a second after the context of r has ended, so that Serve can send the client the
	// reason. Use w from one goroutine at a time, and not after Serve has returned.
	Serve func(c *Call, w http.ResponseWriter, r *http.Request) error
}

const (
	// Open endpoints need no API key.
	Open keys.Scope = "-open"
	// PerCall endpoints accept every valid key. They check the scope of each call in a request themselves.
	PerCall keys.Scope = "-per-call"
)

// AnswerDeadline is the usual Deadline of endpoints.
const AnswerDeadline = 60 * time.Second

// Body is the rule for the bodies of an endpoint's requests. With the zero Body, they are ignored.
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

// JSON returns the rule for a body of type application/json and at most max bytes. The Gateway reads it into [Call.Body]
// before it calls Serve. It must arrive within 30 seconds of the request's first byte.
func JSON(max int64) Body { return Body{jsonBody, max} }

// Stream returns the rule for a body of any type and at most max bytes, which Serve reads from the request. Each read
// must complete within the endpoint's Deadline.
func Stream(max int64) Body { return Body{streamBody, max} }

// path returns the pattern without the method and without the {$} that limits it to that path.
func (e Endpoint) path() string {
	_, path, _ := strings.Cut(e.Pattern, " ")
	return strings.TrimSuffix(path, "{$}")
}

// handle checks an endpoint and adds it to the routes.
func (g *Gateway) handle(e Endpoint) (err error) {
	switch method, path, _ := strings.Cut(e.Pattern, " "); {
	case method == "" || method != strings.ToUpper(method) || !strings.HasPrefix(path, "/"):
		return fmt.Errorf("endpoint %q: the pattern must be a method, a space and a path", e.Pattern)
	case e.Scope == "":
		return fmt.Errorf("endpoint %q has no scope, so anyone could use it", e.Pattern)
	case e.Scope != Open && e.Scope != PerCall && !slices.Contains(keys.Scopes, e.Scope):
		return fmt.Errorf("endpoint %q: there is no scope %q", e.Pattern, e.Scope)
	case e.WholeServer && (e.Scope == Open || e.Scope == PerCall):
		return fmt.Errorf("endpoint %q: WholeServer needs one of the scopes of a key", e.Pattern)
	case e.Scope == Open && e.Body != (Body{}):
		return fmt.Errorf("endpoint %q: an open endpoint cannot have a body", e.Pattern)
	case e.WebSocket && (method != http.MethodGet || e.Body != (Body{})):
		return fmt.Errorf("endpoint %q: a WebSocket needs the method GET and has no body", e.Pattern)
	case e.Deadline <= 0:
		return fmt.Errorf("endpoint %q has no deadline, so a client that does not read could block its connection forever", e.Pattern)
	case e.Serve == nil:
		return fmt.Errorf("endpoint %q has no Serve function", e.Pattern)
	}
	defer func() {
		if v := recover(); v != nil { // ServeMux panics on an invalid or conflicting pattern
			err = fmt.Errorf("endpoint %q: %v", e.Pattern, v)
		}
	}()
	path := e.path()
	g.mux.HandleFunc(e.Pattern, func(w http.ResponseWriter, r *http.Request) {
		w.(*response).call.serve(&e, path, r)
	})
	return nil
}

// openEndpoints need no API key, so they only say that a server is here. The version is not public.
var openEndpoints = []Endpoint{
	constant("GET "+rpc.RootPath+"{$}", "text/plain; charset=utf-8", rootText),
	constant("GET "+rpc.HealthPath, "application/json", healthBody),
	constant("GET "+rpc.HealthzPath, "application/json", healthBody),
}

const healthBody = `{"message":"Service is healthy"}`

const rootText = `This is msbd, a server that runs code in sandboxes.

Check that it works:  GET ` + rpc.HealthPath + `
Call its methods:     POST ` + rpc.Path + ` (JSON-RPC 2.0, with an API key)
Connect an assistant: POST ` + rpc.MCPPath + ` (MCP, with an API key)

The method rpc.discover describes all methods.
Documentation: https://github.com/msbd/msbd
`

// constant returns an open endpoint that always returns the same body.
func constant(pattern, contentType, body string) Endpoint {
	return Endpoint{
		Pattern: pattern, Scope: Open, Deadline: AnswerDeadline,
		Serve: func(_ *Call, w http.ResponseWriter, _ *http.Request) error {
			w.Header().Set("Content-Type", contentType)
			_, err := io.WriteString(w, body)
			return err
		},
	}
}
