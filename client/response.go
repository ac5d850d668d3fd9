package client

import (
	"bytes"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
)

// Errors of runs for which errdefs has no class.
var (
	// ErrRunTimeout is the class of a run that reached its time limit and was interrupted. The REPL session
	// continues.
	ErrRunTimeout = errors.New("time limit of the run reached")
	// ErrCommandNotFound is the class of a command that names a program which the sandbox does not have.
	ErrCommandNotFound = errors.New("command not found")
	// ErrRunFailed is the class of a run that had begun, and failed in the sandbox or was lost. It may have taken effect.
	ErrRunFailed = errors.New("run failed")
	// ErrCommandNotExecutable is the class of a command whose file exists in the sandbox but cannot be run. It is also an
	// ErrCommandNotFound, which older servers return for it.
	ErrCommandNotExecutable = fmt.Errorf("command cannot be run: %w", ErrCommandNotFound)
)

// Error is an error that the server returned. [errors.Is] matches its class:
//
//	rpc.CodeUnauthenticated                       errdefs.ErrUnauthenticated
//	rpc.CodePermissionDenied                      errdefs.ErrPermissionDenied
//	rpc.CodeNotFound                              errdefs.ErrNotFound
//	rpc.CodeConflict                              errdefs.ErrConflict
//	rpc.CodeExhausted                             errdefs.ErrResourceExhausted
//	rpc.CodeRunTimeout                            ErrRunTimeout
//	rpc.CodeCommandNotFound                       ErrCommandNotFound
//	rpc.CodeRunFailed                             ErrRunFailed
//	rpc.CodeCommandNotExecutable                  ErrCommandNotExecutable
//	rpc.CodeUnavailable                           errdefs.ErrUnavailable
//	rpc.CodeInvalidParams, InvalidRequest, Parse  errdefs.ErrInvalidArgument
//	rpc.CodeMethodNotFound                        errdefs.ErrNotImplemented
//	rpc.CodeInternal                              errdefs.ErrInternal
type Error struct {
	// Code is 0 if the response did not come from msbd, but from a proxy in front of it.
	Code    rpc.Code
	Message string
	// Status is the HTTP status code.
	Status int
	// RequestID identifies the request in the server's log. It may be empty.
	RequestID string
	// RetryAfter is how long the server asks the client to wait, or 0 if the server did not ask.
	RetryAfter time.Duration
	// Output is what a run had printed that reached a limit, or that failed after it had printed something. It is nil for
	// other errors. The error of a run whose output was sent while it was printed has no Output.Output.
	Output *rpc.PartialOutput
}

func (e *Error) Error() string { return e.Message }

// Unwrap returns the class of the error.
func (e *Error) Unwrap() error {
	if class, ok := codeClasses[e.Code]; ok {
		return class
	}
	if class, ok := statusClasses[e.Status]; ok {
		return class
	}
	return errdefs.ErrUnknown
}

var codeClasses = map[rpc.Code]error{
	rpc.CodeParse:            errdefs.ErrInvalidArgument,
	rpc.CodeInvalidRequest:   errdefs.ErrInvalidArgument,
	rpc.CodeInvalidParams:    errdefs.ErrInvalidArgument,
	rpc.CodeMethodNotFound:   errdefs.ErrNotImplemented,
	rpc.CodeInternal:         errdefs.ErrInternal,
	rpc.CodeUnauthenticated:  errdefs.ErrUnauthenticated,
	rpc.CodeNotFound:         errdefs.ErrNotFound,
	rpc.CodePermissionDenied: errdefs.ErrPermissionDenied,
	rpc.CodeConflict:         errdefs.ErrConflict,
	rpc.CodeExhausted:        errdefs.ErrResourceExhausted,
	rpc.CodeRunTimeout:       ErrRunTimeout,
	rpc.CodeCommandNotFound:  ErrCommandNotFound,
	rpc.CodeRunFailed:        ErrRunFailed,
	rpc.CodeUnavailable:      errdefs.ErrUnavailable,

	rpc.CodeCommandNotExecutable: ErrCommandNotExecutable,
}

// statusClasses is for responses of proxies and for codes that only a newer server knows.
var statusClasses = map[int]error{
	http.StatusUnauthorized:       errdefs.ErrUnauthenticated,
	http.StatusForbidden:          errdefs.ErrPermissionDenied,
	http.StatusTooManyRequests:    errdefs.ErrResourceExhausted,
	http.StatusBadGateway:         errdefs.ErrUnavailable,
	http.StatusServiceUnavailable: errdefs.ErrUnavailable,
	http.StatusGatewayTimeout:     errdefs.ErrUnavailable,
}

// response is an HTTP response whose body was read to the end.
type response struct {
	status int
	header http.Header
	body   []byte
}

// result returns the result of a call. Its error is an *Error.
func (r *response) result() (jsontext.Value, error) {
	var res rpc.Response
	if err := r.decode(&res); err != nil {
		return nil, err
	}
	switch {
	case res.Error != nil:
		return nil, r.newError(res.Error)
	case r.status != http.StatusOK || res.Result == nil:
		return nil, r.unexpected()
	}
	return res.Result, nil
}

// decode decodes a JSON body. It ignores unknown members, because a newer server may add some.
func (r *response) decode(into any) error {
	kind, _, _ := mime.ParseMediaType(r.header.Get("Content-Type"))
	if kind != "application/json" || json.Unmarshal(r.body, into) != nil {
		return r.unexpected()
	}
	return nil
}

func (r *response) newError(e *rpc.Error) *Error {
	out := &Error{
		Code: e.Code, Message: e.Message, Status: r.status,
		RequestID: r.header.Get("X-Request-Id"), RetryAfter: retryAfter(r.header.Get("Retry-After")),
	}
	if e.Data != nil {
		out.Output = e.Data.PartialOutput
	}
	return out
}

// unexpected returns the error for a response that msbd would not send.
func (r *response) unexpected() *Error {
	text := fmt.Sprintf("the response (HTTP status %d) did not come from msbd: check the server's URL and any proxy in front of the server", r.status)
	if to := r.header.Get("Location"); to != "" && r.status/100 == 3 {
		text = fmt.Sprintf("the server redirects to %q. Redirects are not followed, because that would send the API key there: set the "+
			"server's URL to the right one", to)
	}
	if bytes.HasPrefix(r.body, []byte("Client sent an HTTP request to an HTTPS server")) {
		text = "the server requires TLS: use https:// in its URL"
	}
	return r.newError(&rpc.Error{Message: text})
}

// retryAfter parses a Retry-After header, which is a number of seconds or a date. It returns 0 if it cannot.
func retryAfter(header string) time.Duration {
	if seconds, err := strconv.ParseUint(header, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(header); err == nil {
		return max(0, time.Until(at))
	}
	return 0
}
