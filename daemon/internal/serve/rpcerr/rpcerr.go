// Package rpcerr turns a domain error into what a caller is told: a gRPC status for the admin
// socket, a JSON-RPC error and an HTTP status for the gateway. It is the only place where an error
// class becomes a number. The packages of serve import it; it knows nothing of requests.
package rpcerr

import (
	"strings"

	"github.com/containerd/errdefs"
)

// classes are the words that an errdefs class puts at the end of an error's text. Errors of this
// project say by themselves what happened, so that the class is noise to a reader.
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
}

// Message is the text of a classified error without its class.
func Message(err error) string {
	text := err.Error()
	for _, class := range classes {
		if s, ok := strings.CutSuffix(text, ": "+class.Error()); ok {
			return s
		}
	}
	return text
}

// Shorten keeps what a client sent from filling a message.
func Shorten(s string) string {
	if len(s) > 100 {
		return strings.ToValidUTF8(s[:100], "") + "…"
	}
	return s
}
