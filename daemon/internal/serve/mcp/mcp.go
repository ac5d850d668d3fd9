// Package mcp serves the Model Context Protocol, over Streamable HTTP, to AI assistants. Its tools are the
// methods of JSON-RPC, which check what the caller may do. Package daemon makes the Handler.
//
// There are no sessions: the gateway authenticates every request.
package mcp

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
)

// Revisions of the protocol that are spoken, the newest first.
var Revisions = []string{"2026-07-28", "2025-11-25", "2025-06-18", "2025-03-26"}

// Methods is the table of JSON-RPC methods. A *rpc.Service of package serve/rpc is one.
type Methods interface {
	// Call calls a method with named params for whoever made the request c, and ends when ctx does.
	Call(ctx context.Context, c *gateway.Call, method string, params jsontext.Value) (jsontext.Value, *rpc.Error)
	// Schemas returns the JSON Schemas of a method's params, as an object, and of its result.
	Schemas(method string) (params, result jsontext.Value)
	// CountMessages reads a body as strict JSON, and returns how many messages of JSON-RPC it holds.
	CountMessages(body []byte) (int, error)
}

const instructions = "Start a sandbox, a microVM, with sandbox_start; run code or commands in it, which keeps its state from one run to " +
	"the next; and stop it with sandbox_stop when it is no longer needed. What runs inside cannot reach this machine."

// sessionHeader carries a label that clients before 2026-07-28 repeat. It stands for nothing that is kept: it
// only tells apart, among clients of one key, whose run is to be cancelled.
const sessionHeader = "Mcp-Session-Id"

// Handler serves MCP. Make it with New.
type Handler struct {
	methods Methods
	// whole answers with one JSON document, streamed with events before it.
	whole, streamed http.Handler
	running         running
	// beat is how often a run reports that it is still in progress.
	beat time.Duration
}

// New makes a Handler of the version that it reports to clients. It fails if methods lacks a method of a tool.
func New(methods Methods, version string) (*Handler, error) {
	h := &Handler{methods: methods, beat: 5 * time.Second, running: running{runs: map[run]context.CancelCauseFunc{}}}
	server := sdk.NewServer(&sdk.Implementation{Name: "msbd", Title: "msbd sandboxes", Version: version}, &sdk.ServerOptions{
		Instructions: instructions,
		// Neither list changes while the server runs.
		Capabilities:              &sdk.ServerCapabilities{Tools: &sdk.ToolCapabilities{}, Prompts: &sdk.PromptCapabilities{}},
		SupportedProtocolVersions: Revisions,
	})
	server.AddReceivingMiddleware(guard)
	for _, t := range tools {
		params, result := methods.Schemas(t.method)
		if params == nil {
			return nil, fmt.Errorf("tool %s: there is no method %s", t.name, t.method)
		}
		server.AddTool(t.describe(params, result), h.handler(t))
	}
	for _, p := range prompts {
		server.AddPrompt(p.describe(), p.get)
	}
	serve := func(whole bool) http.Handler {
		return sdk.NewStreamableHTTPHandler(func(*http.Request) *sdk.Server { return server }, &sdk.StreamableHTTPOptions{
			Stateless: true, JSONResponse: whole,
			// The gateway has looked at the Host, which behind a proxy is not this machine's.
			DisableLocalhostProtection: true,
		})
	}
	h.whole, h.streamed = serve(true), serve(false)
	return h, nil
}

// Endpoint is the HTTP path of MCP.
func (h *Handler) Endpoint() gateway.Endpoint {
	return gateway.Endpoint{
		Pattern: "POST " + rpc.MCPPath, Scope: gateway.PerCall, Body: gateway.JSON(rpc.MaxBody), Deadline: gateway.AnswerDeadline,
		Serve: h.serve,
	}
}

// request is one HTTP request, which may hold several messages.
type request struct {
	call *gateway.Call
	// ctx ends when the client leaves, its key is refused, or the client cancels its tool call. The library detaches
	// what it runs from the context of the request.
	ctx context.Context
	// turn holds one while a tool runs, so that a batch is no way around the bounds of a key.
	turn chan struct{}
}

// requestKey is for the one value that has to travel in a context: the library hands nothing else of a request on to its
// tools. (A server of its own for each request, with tools that know the request, takes four times as long.)
type requestKey struct{}

// guard keeps a panic in one of the library's goroutines from ending msbd, and refuses a request whose response would
// never end.
func guard(next sdk.MethodHandler) sdk.MethodHandler {
	return func(ctx context.Context, method string, req sdk.Request) (res sdk.Result, err error) {
		defer func() {
			if v := recover(); v != nil {
				res, err = nil, fmt.Errorf("panic: %v\n%s", v, debug.Stack())
			}
		}()
		if method == "subscriptions/listen" {
			return nil, &jsonrpc.Error{Code: jsonrpc.CodeMethodNotFound, Message: "nothing here changes, so there is nothing to subscribe to"}
		}
		return next(ctx, method, req)
	}
}

// message is what has to be known of a JSON-RPC message before the library reads it.
type message struct {
	ID     jsontext.Value `json:"id"`
	Method string         `json:"method"`
	Params struct {
		Meta struct {
			ProgressToken jsontext.Value `json:"progressToken"`
		} `json:"_meta"`
		RequestID jsontext.Value `json:"requestId"`
	} `json:"params"`
}

// serve answers one request.
func (h *Handler) serve(c *gateway.Call, w http.ResponseWriter, r *http.Request) error {
	var m message
	if json.Unmarshal(c.Body, &m) != nil {
		m = message{} // a batch, or nothing that the library takes
	}
	this := &request{call: c, ctx: r.Context(), turn: make(chan struct{}, 1)}
	named := run{caller: c.Principal.KeyID, label: r.Header.Get(sessionHeader), id: string(m.ID)}
	streams := false
	switch m.Method {
	case "initialize":
		w.Header().Set(sessionHeader, rand.Text())
	case "tools/call":
		// Before anything else: a cancellation may overtake what the library does before it calls the tool.
		cancellable, remove := h.running.add(this.ctx, named)
		defer remove()
		this.ctx = cancellable
		streams = m.Params.Meta.ProgressToken != nil
	case "notifications/cancelled":
		named.id = string(m.Params.RequestID)
		h.running.cancel(named)
	}
	n, err := h.methods.CountMessages(c.Body)
	if err != nil {
		return err
	}
	c.CountCalls(n)
	library := h.whole
	if streams {
		library = h.streamed
	}
	// The library must not leave before its tools, which end with this.ctx: they tell the client why.
	r = r.WithContext(context.WithValue(context.WithoutCancel(r.Context()), requestKey{}, this))
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(c.Body)), int64(len(c.Body))
	out := &responseWriter{ResponseWriter: w}
	library.ServeHTTP(out, r)
	return out.refusal()
}

// errRefused stands in the log for what the library says of a request, which may quote the client.
var errRefused = errors.New("the library of MCP does not take the request")

// responseWriter keeps an error that the library writes in plain text, for the envelope of JSON-RPC.
type responseWriter struct {
	http.ResponseWriter
	status int
	text   []byte
}

func (w *responseWriter) WriteHeader(status int) {
	if status >= http.StatusBadRequest && !strings.HasPrefix(w.Header().Get("Content-Type"), "application/json") {
		w.status = status
		return
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *responseWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		return w.ResponseWriter.Write(p)
	}
	if len(w.text) < 1<<10 {
		w.text = append(w.text, p...)
	}
	return len(p), nil
}

// Unwrap is for http.ResponseController.
func (w *responseWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// refusal is what the library refused the request with; nil if it did not.
func (w *responseWriter) refusal() error {
	if w.status == 0 {
		return nil
	}
	return &gateway.Refusal{
		Status: w.status, Cause: errRefused,
		ClientError: &rpc.Error{Code: rpc.CodeInvalidRequest, Message: rpcerr.Shorten(strings.TrimSpace(string(w.text)))},
	}
}

// run names a tool call in progress: one of a key, a client of it, and an id as it was written.
type run struct{ caller, label, id string }

// running are the calls that a client can cancel by name. The clients of revision 2026-07-28 do so by
// leaving, which needs no name.
type running struct {
	mu   sync.Mutex
	runs map[run]context.CancelCauseFunc
}

// add keeps a run until remove is called. The returned context ends when the client cancels it.
func (r *running) add(ctx context.Context, this run) (_ context.Context, remove func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	if this.label == "" {
		return ctx, func() { cancel(nil) }
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, twice := r.runs[this]; twice {
		return ctx, func() { cancel(nil) } // ids are the client's to keep apart
	}
	r.runs[this] = cancel
	return ctx, func() {
		cancel(nil)
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.runs, this)
	}
}

func (r *running) cancel(this run) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if cancel := r.runs[this]; cancel != nil {
		cancel(errCancelled)
	}
}
