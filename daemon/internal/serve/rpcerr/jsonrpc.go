package rpcerr

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// JSONRPC converts err to the error that a remote client gets, with a text of limited length. An error without a class
// is a fault of the server: it becomes CodeInternal with a text that reveals nothing, and the caller of JSONRPC must
// log the cause under requestID. If err wraps an [rpc.Error], that is returned unchanged.
func JSONRPC(err error, requestID string) *rpc.Error {
	if e, ok := errors.AsType[*rpc.Error](err); ok {
		return e
	}
	code := rpc.CodeInternal
	switch {
	case errors.Is(err, sandbox.ErrRunTimeout):
		code = rpc.CodeRunTimeout
	case errors.Is(err, sandbox.ErrCommandNotFound):
		code = rpc.CodeCommandNotFound
	case errors.Is(err, sandbox.ErrRunFailed): // before the classes, because it may wrap why the run was interrupted
		code = rpc.CodeRunFailed
	case errors.Is(err, sandbox.ErrCommandNotExecutable):
		code = rpc.CodeCommandNotExecutable
	case errdefs.IsNotFound(err):
		code = rpc.CodeNotFound
	case errdefs.IsAlreadyExists(err), errdefs.IsFailedPrecondition(err), errdefs.IsConflict(err):
		code = rpc.CodeConflict
	case errdefs.IsInvalidArgument(err):
		code = rpc.CodeInvalidParams
	case errdefs.IsResourceExhausted(err):
		code = rpc.CodeExhausted
	case errdefs.IsUnavailable(err):
		code = rpc.CodeUnavailable
	case errdefs.IsPermissionDenied(err):
		code = rpc.CodePermissionDenied
	case errdefs.IsUnauthorized(err):
		code = rpc.CodeUnauthenticated
	case errors.Is(err, ErrStopping):
		return &rpc.Error{
			Code: rpc.CodeUnavailable, Message: "the request was cut short because the server is stopping; try again in a moment",
			Data: &rpc.ErrorData{RetryAfter: retryAfter},
		}
	case errors.Is(err, context.Canceled): // reaches the client only if it closed just its own side of the connection
		return &rpc.Error{
			Code:    rpc.CodeInvalidRequest,
			Message: "the request was canceled, because the client closed its side of the connection; keep it open until the response",
		}
	}
	if code == rpc.CodeInternal {
		return &rpc.Error{
			Code:    code,
			Message: "internal error; the server's log has the cause under request id " + requestID,
			Data:    &rpc.ErrorData{RequestID: requestID},
		}
	}
	e := &rpc.Error{Code: code, Message: bounded.Text(Message(err), maxMessage)}
	if seconds := retryAfterOf(err); seconds > 0 && (code == rpc.CodeExhausted || code == rpc.CodeUnavailable) {
		e.Data = &rpc.ErrorData{RetryAfter: seconds}
	}
	return e
}

// ErrStopping is why the contexts of requests end when the server stops. A call that had not begun a run may be tried
// again.
var ErrStopping error = stopping{}

type stopping struct{}

func (stopping) Error() string { return "the server is stopping" }
func (stopping) Unwrap() error { return context.Canceled }

// maxMessage limits the text of an error, in bytes. It may quote what a client or code in a sandbox sent.
const maxMessage = 4 << 10

// retryAfter is how many seconds a client should wait when the server cannot tell how long it takes.
const retryAfter = 1

// retryAfterOf returns after how many seconds a client may try again what failed with err, or 0 if that cannot help.
func retryAfterOf(err error) int {
	if refusal, ok := errors.AsType[*sandbox.Refusal](err); ok {
		return int(refusal.RetryAfter / time.Second)
	}
	if errors.Is(err, sandbox.ErrNoSpace) || errors.Is(err, sandbox.ErrSandboxFull) {
		return 0
	}
	return retryAfter
}

// HTTPStatus returns the status of an HTTP response that carries only an error with this code.
func HTTPStatus(code rpc.Code) int {
	switch code {
	case rpc.CodeParse, rpc.CodeInvalidRequest, rpc.CodeInvalidParams:
		return http.StatusBadRequest
	case rpc.CodeUnauthenticated:
		return http.StatusUnauthorized
	case rpc.CodePermissionDenied:
		return http.StatusForbidden
	case rpc.CodeMethodNotFound, rpc.CodeNotFound:
		return http.StatusNotFound
	case rpc.CodeConflict:
		return http.StatusConflict
	case rpc.CodeCommandNotFound, rpc.CodeCommandNotExecutable:
		return http.StatusUnprocessableEntity
	case rpc.CodeExhausted:
		return http.StatusTooManyRequests
	case rpc.CodeRunFailed:
		return http.StatusBadGateway
	case rpc.CodeUnavailable:
		return http.StatusServiceUnavailable
	case rpc.CodeRunTimeout:
		return http.StatusGatewayTimeout
	default:
		return http.StatusInternalServerError
	}
}
