// Package mcp serves the Model Context Protocol to AI assistants, over Streamable HTTP. Its tools call the JSON-RPC
// methods, which authorize the caller. Package daemon creates the Handler.
//
// There are no sessions: the gateway authenticates every request.
package mcp

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/serve/wire"
)

// Revisions are the supported protocol revisions, newest first.
var Revisions = []string{"2026-07-28", "2025-11-25", "2025-06-18", "2025-03-26"}

// Methods is the table of JSON-RPC methods. *rpc.Service of package serve/rpc implements it.
type Methods interface {
	// Call calls a method with named params on behalf of the caller of c. It is canceled with ctx. If excerpt is not nil,
	// the output of a run is as excerpt says.
	Call(ctx context.Context, c *gateway.Call, method string, params jsontext.Value, excerpt *wire.Excerpt) (jsontext.Value, *rpc.Error)
	// Schemas returns the JSON Schemas of a method's params (given by name) and of its result. Both are nil if there is
	// no such method.
	Schemas(method string) (params, result jsontext.Value)
	// CountMessages checks that body is strict JSON and returns how many JSON-RPC messages it holds.
	CountMessages(body []byte) (int, error)
}

const instructions = "Start a sandbox (a microVM) with sandbox_start, run code and commands in it, and stop it with sandbox_stop when it is no " +
	"longer needed. A sandbox keeps its state between runs. Servers and long jobs run in the background with sandbox_start_process. Code in a " +
	"sandbox cannot reach the machine that it runs on."

// sessionHeader carries a label that the server issues at initialize and that clients of revisions before 2026-07-28
// send with every request. The server keeps no session for it. It only distinguishes the clients of one key, so that a
// client can cancel only its own calls.
const sessionHeader = "Mcp-Session-Id"

// revisionHeader carries the revision of the protocol that the client uses. Clients of firstRevision do not send it.
const (
	revisionHeader = "MCP-Protocol-Version"
	firstRevision  = "2025-03-26"
)

// Handler serves MCP. Create it with New.
type Handler struct {
	methods Methods
	// The MCP library handles a request with one of these: jsonHandler responds with one JSON document, eventHandler
	// with a stream of events that ends with the result.
	jsonHandler, eventHandler http.Handler
	running                   runningCalls
	logLevels                 logLevels
	// progressInterval is the time between two progress notifications of a call, and maxSilence the time after which the
	// response to a call without a progress token becomes a stream that is kept alive.
	progressInterval, maxSilence time.Duration
}

// New returns a Handler. version is the server version that it reports to clients. New returns an error if methods
// lacks the method of a tool.
func New(methods Methods, version string) (*Handler, error) {
	h := &Handler{
		methods: methods, progressInterval: 5 * time.Second, maxSilence: 15 * time.Second,
		running: runningCalls{cancels: map[callKey]context.CancelCauseFunc{}}, logLevels: newLogLevels(),
	}
	server := sdk.NewServer(&sdk.Implementation{Name: "msbd", Title: "msbd sandboxes", Version: version}, &sdk.ServerOptions{
		Instructions: instructions,
		// None of the lists changes while the server runs.
		Capabilities: &sdk.ServerCapabilities{
			Tools: &sdk.ToolCapabilities{}, Prompts: &sdk.PromptCapabilities{}, Resources: &sdk.ResourceCapabilities{},
			//lint:ignore SA1019 Only the newest revision deprecates it, and the older ones have no other progress without a token.
			Logging: &sdk.LoggingCapabilities{},
		},
		SupportedProtocolVersions: Revisions,
	})
	server.AddReceivingMiddleware(guard)
	for _, t := range tools {
		params, result := methods.Schemas(t.method)
		if params == nil {
			return nil, fmt.Errorf("tool %s: there is no method %s", t.name, t.method)
		}
		server.AddTool(t.describe(params, result), h.toolHandler(t))
	}
	for _, p := range prompts {
		server.AddPrompt(p.describe(), p.get)
	}
	server.AddResourceTemplate(fileTemplate, h.readResource)
	newHandler := func(jsonResponse bool) http.Handler {
		return sdk.NewStreamableHTTPHandler(func(*http.Request) *sdk.Server { return server }, &sdk.StreamableHTTPOptions{
			Stateless: true, JSONResponse: jsonResponse,
			// The gateway checks the Host header, which is not a name of this machine if a proxy forwards requests.
			DisableLocalhostProtection: true,
		})
	}
	h.jsonHandler, h.eventHandler = newHandler(true), newHandler(false)
	return h, nil
}

// Endpoint returns the gateway's endpoint for MCP.
func (h *Handler) Endpoint() gateway.Endpoint {
	return gateway.Endpoint{
		Pattern: "POST " + rpc.MCPPath, Scope: gateway.PerCall, Body: gateway.JSON(rpc.MaxBody), Deadline: gateway.AnswerDeadline,
		Serve: h.serve,
	}
}

// request is one HTTP request, which may hold several messages.
type request struct {
	call *gateway.Call
	// ctx is canceled when the client disconnects, its key becomes invalid, or it cancels its tool call. It is kept
	// here because the library does not derive the context of a tool from that of the HTTP request.
	ctx context.Context
	// sem is a semaphore of one: the calls of a batch run one after the other, so that a batch cannot evade the limits
	// of the key.
	sem chan struct{}
	// revision is the revision of the protocol that the client uses.
	revision string
	// client identifies the client among those of all keys: it is a callKey without an id.
	client callKey
	// response is the response that the library writes.
	response *responseWriter
}

// requestKey is the context key of the *request. A context value is necessary because the library passes nothing else
// of a request to its tools. (A separate server for each request, with tools that know the request, takes four times as
// long.)
type requestKey struct{}

// guard recovers from panics in goroutines of the library, which would otherwise end msbd.
func guard(next sdk.MethodHandler) sdk.MethodHandler {
	return func(ctx context.Context, method string, req sdk.Request) (res sdk.Result, err error) {
		defer func() {
			if v := recover(); v != nil {
				res, err = nil, fmt.Errorf("panic: %v\n%s", v, debug.Stack())
			}
		}()
		return next(ctx, method, req)
	}
}

// serve handles one HTTP request.
func (h *Handler) serve(c *gateway.Call, w http.ResponseWriter, r *http.Request) error {
	m, id, invalid := checkMessages(c.Body)
	var params paramsOf
	_ = json.Unmarshal(m.Params, &params) // a tool reports what is wrong with its arguments
	revision := r.Header.Get(revisionHeader)
	req := &request{
		call: c, ctx: r.Context(), sem: make(chan struct{}, 1), revision: cmp.Or(revision, firstRevision), response: &responseWriter{ResponseWriter: w},
		client: callKey{keyID: c.Principal.KeyID, label: r.Header.Get(sessionHeader)},
	}
	key := req.client
	library := h.jsonHandler
	switch m.method() {
	case "initialize":
		w.Header().Set(sessionHeader, rand.Text())
	case "tools/call":
		// Register the call before passing it to the library, so that a cancellation that arrives before the library
		// calls the tool is not lost.
		key.id = string(m.ID)
		cancellable, remove := h.running.add(req.ctx, key)
		defer remove()
		req.ctx = cancellable
		library = h.eventHandler
		req.response.single = true
	case "notifications/cancelled":
		key.id = string(params.RequestID)
		h.running.cancel(key)
	case "logging/setLevel":
		var level string
		_ = json.Unmarshal(params.Level, &level) // the library refuses what is not a level
		h.logLevels.set(req.client, level)
	}
	n, err := h.methods.CountMessages(c.Body)
	if err != nil {
		return err
	}
	c.CountCalls(n)
	if rpcErr := checkRevision(revision); rpcErr != nil {
		return refuse(rpcErr, nil, revision)
	}
	if invalid != nil {
		return refuse(invalid, id, revision)
	}
	// Do not cancel the library with the request: it must wait for its tools, which end with req.ctx and tell the client
	// why they ended.
	r = r.WithContext(context.WithValue(context.WithoutCancel(r.Context()), requestKey{}, req))
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(c.Body)), int64(len(c.Body))
	c.TakeTurns() // the library works long even for a small message
	library.ServeHTTP(req.response, r)
	return req.response.refusal()
}

// refuse returns the error for a message whose id is id, or nil if that is not known. Until revision 2026-07-28, the error of
// a request has the status 200, because 404 tells clients that their session has ended.
func refuse(rpcErr *rpc.Error, id jsontext.Value, revision string) error {
	status := rpcerr.HTTPStatus(rpcErr.Code)
	if id != nil && rpcErr.Code != rpc.CodeInvalidRequest && revision < Revisions[0] {
		status = http.StatusOK
	}
	return &gateway.Refusal{Status: status, ClientError: rpcErr, ID: id, Cause: errNotMCP}
}

// errNotMCP is logged instead of the exact error, which may quote the request.
var errNotMCP = errors.New("the body is not a valid MCP message")

// callKey identifies a tool call in progress: the id of the API key, the label of the client, and the JSON-RPC id as the
// client wrote it.
type callKey struct{ keyID, label, id string }

// runningCalls are the tool calls that a client can cancel with notifications/cancelled. Clients of revision 2026-07-28
// disconnect instead.
type runningCalls struct {
	mu      sync.Mutex
	cancels map[callKey]context.CancelCauseFunc
}

// add registers a call until remove is called. The returned context is canceled when the client cancels the call.
func (r *runningCalls) add(ctx context.Context, key callKey) (_ context.Context, remove func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	if key.label == "" {
		return ctx, func() { cancel(nil) }
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, duplicate := r.cancels[key]; duplicate {
		return ctx, func() { cancel(nil) } // clients must use unique ids; a second call cannot be canceled
	}
	r.cancels[key] = cancel
	return ctx, func() {
		cancel(nil)
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.cancels, key)
	}
}

func (r *runningCalls) cancel(key callKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if cancel := r.cancels[key]; cancel != nil {
		cancel(errCanceled)
	}
}
