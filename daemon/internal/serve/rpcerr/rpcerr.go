// Package rpcerr converts domain errors to the errors that clients get: a gRPC status on the admin
// socket, a JSON-RPC error and an HTTP status on the gateway. It is the only place where an error
// class becomes a number. Only the packages under serve import it; it does not depend on requests.
package rpcerr

import (
	"strings"

	"github.com/containerd/errdefs"
)

// classes lists the errdefs classes whose text Message removes from the end of an error. The errors of
// this project already say what happened, so the text of the class adds nothing.
var classes = []error{
	errdefs.ErrInvalidArgument,
	errdefs.ErrNotFound,
	errdefs.ErrAlreadyExists,
	errdefs.ErrPermissionDenied,
	errdefs.ErrResourceExhausted,
	errdefs.ErrFailedPrecondition,
	errdefs.ErrConflict,
	errdefs.ErrUnavailable,
	errdefs.ErrUnauthenticated,
	errdefs.ErrDataLoss,
}

// Message returns the text of err without the text of its class at the end.
func Message(err error) string {
	text := err.Error()
	for _, class := range classes {
		if s, ok := strings.CutSuffix(text, ": "+class.Error()); ok {
			return s
		}
	}
	return text
}
