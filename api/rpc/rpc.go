// Package rpc is what remote clients and the server say to each other over HTTP: the JSON-RPC 2.0
// envelope, the names of the methods, their params and results, and the error codes. It is shared
// vocabulary: it has no behaviour and imports nothing of this project.
//
// A request is POSTed to [Path] as application/json with an API key in the Authorization header.
// Success is HTTP 200 with a result; each failure has an HTTP status of its own and an [Error].
package rpc

import "github.com/go-json-experiment/json/jsontext"

// Paths of the HTTP API. The three last ones are aliases of Path: they take the same requests.
const (
	HealthPath     = "/api/v1/health"
	MetricsPath    = "/metrics" // for Prometheus
	MCPPath        = "/mcp"     // the Model Context Protocol, over Streamable HTTP
	Path           = "/api/v1/rpc"
	StartPath      = "/api/v1/sandbox/start"
	StopPath       = "/api/v1/sandbox/stop"
	RunCommandPath = "/api/v1/sandbox/command/run"
)

// Version is the only value of the member jsonrpc.
const Version = "2.0"

// MethodDiscover answers the OpenRPC document of the server. It takes no params.
const MethodDiscover = "rpc.discover"

// Limits of one HTTP request.
const (
	// MaxBody is the longest accepted body in bytes.
	MaxBody = 1 << 20
	// MaxBatch is how many requests a batch may hold.
	MaxBatch = 100
	// MaxDepth is how deep a body may be nested.
	MaxDepth = 64
)

// Request is one call.
type Request struct {
	JSONRPC string         `json:"jsonrpc"`
	Method  string         `json:"method"`
	Params  jsontext.Value `json:"params,omitzero"`
	// ID is a string, a number or null, and comes back as it was sent.
	ID jsontext.Value `json:"id,omitzero"`
}

// Response answers a Request. Exactly one of Result and Error is there.
type Response struct {
	JSONRPC string         `json:"jsonrpc"`
	Result  jsontext.Value `json:"result,omitzero"`
	Error   *Error         `json:"error,omitzero"`
	// ID is the request's, or null when it had none or could not be read.
	ID jsontext.Value `json:"id"`
}

// Error says why a call failed, in words meant for the caller.
type Error struct {
	Code    Code       `json:"code"`
	Message string     `json:"message"`
	Data    *ErrorData `json:"data,omitzero"`
}

func (e *Error) Error() string { return e.Message }

// ErrorData is what some errors tell to programs.
type ErrorData struct {
	// RequestID finds the cause of a CodeInternal in the server's log, which alone has it.
	RequestID string `json:"request_id,omitzero"`
	// RetryAfter is in how many seconds to try again: nothing of the call was begun (CodeExhausted), or it may
	// be that by then it can be (CodeUnavailable).
	RetryAfter int `json:"retry_after,omitzero"`
}

// Code is the class of an Error.
type Code int

const (
	// CodeParse (HTTP 400): the body is not strict JSON.
	CodeParse Code = -32700
	// CodeInvalidRequest (HTTP 400, 404, 405, 413, 415, 431): not a JSON-RPC 2.0 request.
	CodeInvalidRequest Code = -32600
	// CodeMethodNotFound (HTTP 404): there is no such method.
	CodeMethodNotFound Code = -32601
	// CodeInvalidParams (HTTP 400): a param is missing, unknown, of the wrong type or out of range.
	CodeInvalidParams Code = -32602
	// CodeInternal (HTTP 500): unforeseen. The server's log has the cause.
	CodeInternal Code = -32603

	// CodeUnauthenticated (HTTP 401): no API key, or one that this server does not accept.
	CodeUnauthenticated Code = -32002
	// CodeNotFound (HTTP 404): there is no such sandbox.
	CodeNotFound Code = -32003
	// CodePermissionDenied (HTTP 403): the key is good, but not for this.
	CodePermissionDenied Code = -32004
	// CodeConflict (HTTP 409): the sandbox exists with another configuration, or in another state.
	CodeConflict Code = -32005
	// CodeExhausted (HTTP 429): over a quota or a rate limit; or, without RetryAfter, a run that printed too
	// much and was interrupted.
	CodeExhausted Code = -32006
	// CodeRunTimeout (HTTP 504): the run reached its time limit and was interrupted.
	CodeRunTimeout Code = -32007
	// CodeCommandNotFound (HTTP 422): the sandbox has no such program.
	CodeCommandNotFound Code = -32008
	// CodeUnavailable (HTTP 503): the server starts or stops, or the sandbox does not answer.
	CodeUnavailable Code = -32009
)
