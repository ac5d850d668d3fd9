// Package rpc defines the JSON-RPC 2.0 API that remote clients use over HTTP: the envelope, the names of the
// methods, their params and results, and the error codes. Client and server share it. It has no behavior and
// imports no other package of this project.
//
// A request is POSTed to [Path] as application/json with an API key in the Authorization header.
// The response to a successful request is HTTP 200 with a result. The response to a failed one has an [Error]
// and the HTTP status that belongs to the error's [Code]. To a request that accepts only [EventStream], the response is a
// stream of events.
package rpc

import "github.com/go-json-experiment/json/jsontext"

// Paths of the HTTP API. The last three are aliases of Path and accept the same requests. HealthzPath is an alias of
// HealthPath.
const (
	RootPath       = "/" // says in plain text what the server is
	HealthPath     = "/api/v1/health"
	HealthzPath    = "/healthz"
	MetricsPath    = "/metrics" // for Prometheus
	MCPPath        = "/mcp"     // the Model Context Protocol, over Streamable HTTP
	Path           = "/api/v1/rpc"
	StartPath      = "/api/v1/sandbox/start"
	StopPath       = "/api/v1/sandbox/stop"
	RunCommandPath = "/api/v1/sandbox/command/run"
)

// Version is the only valid value of the jsonrpc member.
const Version = "2.0"

// MethodDiscover is the method that returns the server's OpenRPC document. It takes no params.
const MethodDiscover = "rpc.discover"

// Limits of one HTTP request.
const (
	// MaxBody is the maximum length of a body in bytes.
	MaxBody = 1 << 20
	// MaxBatch is the maximum number of requests in a batch.
	MaxBatch = 100
	// MaxDepth is the maximum nesting depth of a body.
	MaxDepth = 64
)

// Request is a call of one method.
type Request struct {
	JSONRPC string         `json:"jsonrpc"`
	Method  string         `json:"method"`
	Params  jsontext.Value `json:"params,omitzero"`
	// ID is a string, a number or null. The response returns it unchanged.
	ID jsontext.Value `json:"id,omitzero"`
}

// Response is the response to a Request. Exactly one of Result and Error is present.
type Response struct {
	JSONRPC string         `json:"jsonrpc"`
	Result  jsontext.Value `json:"result,omitzero"`
	Error   *Error         `json:"error,omitzero"`
	// ID is the ID of the request, or null if the request had none or it could not be read.
	ID jsontext.Value `json:"id"`
}

// Error is the reason why a call failed. Message is meant for the caller.
type Error struct {
	Code    Code       `json:"code"`
	Message string     `json:"message"`
	Data    *ErrorData `json:"data,omitzero"`
}

func (e *Error) Error() string { return e.Message }

// ErrorData holds details of some errors for programs.
type ErrorData struct {
	// RequestID identifies the request of a CodeInternal error in the server's log, the only place that has
	// the cause.
	RequestID string `json:"request_id,omitzero"`
	// RetryAfter is the number of seconds after which the call may be tried again. With CodeExhausted, nothing
	// of the call was started. With CodeUnavailable, the call may succeed by then.
	RetryAfter int `json:"retry_after,omitzero"`
	// PartialOutput is what a run had printed that reached a limit, or that failed after it had printed something. It is
	// nil for other errors.
	*PartialOutput
}

// PartialOutput is what a run printed before it was interrupted.
type PartialOutput struct {
	// Output is like that of the result. It has at most the first and the last [PartialBytes] bytes.
	Output []Line `json:"output"`
	// Truncated reports whether something between the elements of Output, or after them, is missing.
	Truncated bool `json:"truncated"`
	// TimedOut reports whether the run reached its time limit.
	TimedOut bool `json:"timed_out"`
}

// PartialBytes is how much of the beginning and of the end of a run's output an error has, in bytes.
const PartialBytes = 64 << 10

// EventStream is the media type of a stream of server-sent events. A request whose Accept header has it, and does not have
// application/json, is answered with such a stream: any number of events of the method, and then exactly one EventResult or
// EventError. The data of an event is JSON.
const EventStream = "text/event-stream"

// Types of events.
const (
	EventOutput    = "output"    // a Line
	EventStarted   = "started"   // of sandbox.fs.watch: changes from now on are reported
	EventChange    = "change"    // an FSChange
	EventDisplay   = "display"   // a Display
	EventException = "exception" // an Exception
	EventResult    = "result"    // the result of the method
	EventError     = "error"     // an Error
)

// Code is the error code of an Error.
type Code int

const (
	// CodeParse (HTTP 400): the body is not strict JSON.
	CodeParse Code = -32700
	// CodeInvalidRequest (HTTP 400, 404, 405, 411, 412, 413, 415, 416, 426, 431): not a JSON-RPC 2.0 request.
	CodeInvalidRequest Code = -32600
	// CodeMethodNotFound (HTTP 404): there is no such method.
	CodeMethodNotFound Code = -32601
	// CodeInvalidParams (HTTP 400): a param is missing, unknown, of the wrong type or out of range.
	CodeInvalidParams Code = -32602
	// CodeInternal (HTTP 500): an unexpected error. The server's log has the cause.
	CodeInternal Code = -32603

	// CodeUnauthenticated (HTTP 401): no API key, or one that this server does not accept.
	CodeUnauthenticated Code = -32002
	// CodeNotFound (HTTP 404): there is no such sandbox, process or file.
	CodeNotFound Code = -32003
	// CodePermissionDenied (HTTP 403): the key is valid but not for this method or namespace.
	CodePermissionDenied Code = -32004
	// CodeConflict (HTTP 409): the sandbox, process or file exists, but not in the state or of the kind that the method needs.
	CodeConflict Code = -32005
	// CodeExhausted (HTTP 429): a quota or a rate limit was reached; or, without RetryAfter, a run printed too
	// much and was interrupted.
	CodeExhausted Code = -32006
	// CodeRunTimeout (HTTP 504): the run reached its time limit and was interrupted.
	CodeRunTimeout Code = -32007
	// CodeCommandNotFound (HTTP 422): the sandbox has no such program.
	CodeCommandNotFound Code = -32008
	// CodeRunFailed (HTTP 502): the run had begun, and failed in the sandbox or was lost. It may have taken effect.
	CodeRunFailed Code = -32010
	// CodeUnavailable (HTTP 503): the server is starting or stopping, or the sandbox is not responding.
	CodeUnavailable Code = -32009
	// CodeCommandNotExecutable (HTTP 422): the command's file exists in the sandbox but cannot be run.
	CodeCommandNotExecutable Code = -32011
)
