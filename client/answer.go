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
	// ErrRunTimeout says that a run reached its time limit and was interrupted. The session goes on.
	ErrRunTimeout = errors.New("time limit of the run reached")
	// ErrCommandNotFound says that the sandbox has no such program.
	ErrCommandNotFound = errors.New("command not found")
)

// Error is a failure that the server told. [errors.Is] finds its class:
//
//	rpc.CodeUnauthenticated                       errdefs.ErrUnauthenticated
//	rpc.CodePermissionDenied                      errdefs.ErrPermissionDenied
//	rpc.CodeNotFound                              errdefs.ErrNotFound
//	rpc.CodeConflict                              errdefs.ErrConflict
//	rpc.CodeExhausted                             errdefs.ErrResourceExhausted
//	rpc.CodeRunTimeout                            ErrRunTimeout
//	rpc.CodeCommandNotFound                       ErrCommandNotFound
//	rpc.CodeUnavailable                           errdefs.ErrUnavailable
//	rpc.CodeInvalidParams, InvalidRequest, Parse  errdefs.ErrInvalidArgument
//	rpc.CodeMethodNotFound                        errdefs.ErrNotImplemented
//	rpc.CodeInternal                              errdefs.ErrInternal
type Error struct {
	// Code is 0 when the answer was not msbd's, but that of a proxy before it.
	Code    rpc.Code
	Message string
	// Status is the HTTP status.
	Status int
	// RequestID finds the request in the server's log; may be empty.
	RequestID string
	// RetryAfter is how long the server asks to wait; 0 if it did not say.
	RetryAfter time.Duration
}

func (e *Error) Error() string { return e.Message }

// Unwrap returns the class.
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
	rpc.CodeUnavailable:      errdefs.ErrUnavailable,
}

// statusClasses are for the answers of proxies, and for the codes of newer servers.
var statusClasses = map[int]error{
	http.StatusUnauthorized:       errdefs.ErrUnauthenticated,
	http.StatusForbidden:          errdefs.ErrPermissionDenied,
	http.StatusTooManyRequests:    errdefs.ErrResourceExhausted,
	http.StatusBadGateway:         errdefs.ErrUnavailable,
	http.StatusServiceUnavailable: errdefs.ErrUnavailable,
	http.StatusGatewayTimeout:     errdefs.ErrUnavailable,
}

// answer is an HTTP answer that was read to its end.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// result is what a call returned. Its error is an *Error.
func (a *answer) result() (jsontext.Value, error) {
	var res rpc.Response
	if err := a.decode(&res); err != nil {
		return nil, err
	}
	switch {
	case res.Error != nil:
		return nil, a.fail(res.Error.Code, res.Error.Message)
	case a.status != http.StatusOK || res.Result == nil:
		return nil, a.foreign()
	}
	return res.Result, nil
}

// decode reads a body of JSON. Members that it does not know are those of a newer server.
func (a *answer) decode(into any) error {
	kind, _, _ := mime.ParseMediaType(a.header.Get("Content-Type"))
	if kind != "application/json" || json.Unmarshal(a.body, into) != nil {
		return a.foreign()
	}
	return nil
}

func (a *answer) fail(code rpc.Code, message string) *Error {
	return &Error{
		Code: code, Message: message, Status: a.status,
		RequestID: a.header.Get("X-Request-Id"), RetryAfter: retryAfter(a.header.Get("Retry-After")),
	}
}

// foreign is the error of an answer that msbd does not give.
func (a *answer) foreign() *Error {
	text := fmt.Sprintf("the answer (HTTP status %d) is not that of msbd; see whether the server's URL is right, and what a proxy before it says", a.status)
	if to := a.header.Get("Location"); to != "" && a.status/100 == 3 {
		text = fmt.Sprintf("the server sends on to %q; that is not followed, since the API key would go along: use the URL that is meant", to)
	}
	if bytes.HasPrefix(a.body, []byte("Client sent an HTTP request to an HTTPS server")) {
		text = "the server speaks TLS: use https:// in its URL"
	}
	return a.fail(0, text)
}

// retryAfter reads the header of this name, in seconds or as a date.
func retryAfter(header string) time.Duration {
	if seconds, err := strconv.ParseUint(header, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(header); err == nil {
		return max(0, time.Until(at))
	}
	return 0
}
