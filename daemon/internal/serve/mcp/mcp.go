// Package mcp serves the Model Context Protocol, over Streamable HTTP, to AI assistants. Its tools are the
// methods that the server has for everyone: it translates, and leaves to them who may do what. Only the
// wiring enters.
//
// There are no sessions: every request stands for itself, and is authenticated by whoever passes it on.
package mcp

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
)

// Revisions of the protocol that are spoken, the newest first.
var Revisions = []string{"2026-07-28", "2025-11-25", "2025-06-18", "2025-03-26"}

// Calls is what MCP asks of the table of methods.
type Calls interface {
	// Call calls a method for whoever made the request that ctx is from, and ends when ctx does.
	Call(ctx context.Context, method string, params jsontext.Value) (jsontext.Value, *rpc.Error)
	// Caller is the id of the key of that request.
	Caller(ctx context.Context) string
	// Schemas are the JSON Schemas of a method's params, as an object, and of its result.
	Schemas(method string) (params, result jsontext.Value)
}

const instructions = "Start a sandbox, a microVM, with sandbox_start; run code or commands in it, which keeps its state from one run to " +
	"the next; and stop it with sandbox_stop when it is no longer needed. What runs inside cannot reach this machine."

// sessionHeader carries a label that clients before 2026-07-28 repeat. It stands for nothing that is kept: it
// only tells apart, among clients of one key, whose run is to be cancelled.
const sessionHeader = "Mcp-Session-Id"

// Handler answers POSTs to rpc.MCPPath. Make it with New.
type Handler struct {
	calls Calls
	// whole answers with one JSON document, streamed with events before it.
	whole, streamed http.Handler
	running         running
	// beat is how often a run tells that it goes on.
	beat time.Duration
}

// New makes a Handler of the version that it tells to clients. It fails if calls lacks a method of a tool.
func New(calls Calls, version string) (*Handler, error) {
	h := &Handler{calls: calls, beat: 5 * time.Second, running: running{runs: map[run]context.CancelCauseFunc{}}}
	server := sdk.NewServer(&sdk.Implementation{Name: "msbd", Title: "msbd sandboxes", Version: version}, &sdk.ServerOptions{
		Instructions: instructions,
		// Neither list changes while the server runs.
		Capabilities:              &sdk.ServerCapabilities{Tools: &sdk.ToolCapabilities{}, Prompts: &sdk.PromptCapabilities{}},
		SupportedProtocolVersions: Revisions,
	})
	server.AddReceivingMiddleware(guard)
	for _, t := range tools {
		params, result := calls.Schemas(t.method)
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
			// Whoever passes requests on has looked at their Host, which behind a proxy is not this machine's.
			DisableLocalhostProtection: true,
		})
	}
	h.whole, h.streamed = serve(true), serve(false)
	return h, nil
}

// guard keeps the library's goroutines from ending the server, and its answers from never ending.
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

// ServeHTTP answers one request, whose body is strict JSON and at most so long as to be read whole.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, "the body could not be read to its end", http.StatusBadRequest)
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	var m message
	if json.Unmarshal(body, &m) != nil {
		m = message{} // a batch, or nothing that the library takes
	}
	this := run{caller: h.calls.Caller(r.Context()), label: r.Header.Get(sessionHeader), id: string(m.ID)}
	answer := h.whole
	switch m.Method {
	case "initialize":
		w.Header().Set(sessionHeader, rand.Text())
	case "tools/call":
		// From here on: a cancellation may overtake what the library does before it calls the tool.
		cancelled, remove := h.running.add(r.Context(), this)
		defer remove()
		r = r.WithContext(context.WithValue(r.Context(), cancelledKey{}, cancelled))
		if m.Params.Meta.ProgressToken != nil {
			answer = h.streamed
		}
	case "notifications/cancelled":
		this.id = string(m.Params.RequestID)
		h.running.cancel(this)
	}
	answer.ServeHTTP(w, r)
}

// run names a tool call in progress: one of a key, a client of it, and an id as it was written.
type run struct{ caller, label, id string }

// cancelledKey is for the context of a tool call that ends when its client cancels it. The library detaches
// what it runs from the context of the request, but keeps its values.
type cancelledKey struct{}

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
