// Package refusal creates the errors for requests that the guest agent rejects. It also translates errors to status
// codes and texts for the host.
package refusal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// maxErrorText is the maximum length of an error's text in bytes. An error may quote a request of any size, but a response
// that is longer than a ttrpc frame ends the connection, and the console to which errors are logged is slow.
const maxErrorText = 4 << 10

// ErrUnsupported is returned for a request for a feature that this guest does not have.
var ErrUnsupported = fmt.Errorf("not supported by this guest: %w", errdefs.ErrNotImplemented)

// Invalid returns an errdefs.ErrInvalidArgument with a text that it formats like fmt.Errorf.
func Invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// Text returns the text of err for the host. It shortens a long text in the middle, because the cause comes last. It
// replaces invalid UTF-8, because a response that is not UTF-8 would end the connection.
func Text(err error) string {
	text := err.Error()
	if len(text) > maxErrorText {
		text = text[:maxErrorText/2] + " … " + text[len(text)-maxErrorText/2:]
	}
	return strings.ToValidUTF8(text, "\ufffd")
}

// Code returns the status code of err for the host. It depends on err's errdefs class, on the error of a context, or on
// the errno that err wraps. It is codes.Internal for any other error.
func Code(err error) codes.Code {
	switch {
	case errdefs.IsNotFound(err):
		return codes.NotFound
	case errdefs.IsInvalidArgument(err):
		return codes.InvalidArgument
	case errdefs.IsAlreadyExists(err):
		return codes.AlreadyExists
	case errdefs.IsFailedPrecondition(err):
		return codes.FailedPrecondition
	case errdefs.IsNotImplemented(err):
		return codes.Unimplemented
	case errdefs.IsOutOfRange(err):
		return codes.OutOfRange
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return codes.DeadlineExceeded
	}
	var errno unix.Errno
	if errors.As(err, &errno) && kernelCodes[errno] != codes.OK {
		return kernelCodes[errno]
	}
	return codes.Internal
}

// kernelCodes maps the errnos that the host's request can cause to status codes.
var kernelCodes = map[unix.Errno]codes.Code{
	unix.EINVAL: codes.InvalidArgument, unix.ERANGE: codes.InvalidArgument, unix.E2BIG: codes.InvalidArgument,
	unix.ENAMETOOLONG: codes.InvalidArgument, unix.ENOTDIR: codes.InvalidArgument,
	unix.EISDIR: codes.InvalidArgument, unix.ENOENT: codes.NotFound, unix.EEXIST: codes.AlreadyExists,
	unix.ELOOP: codes.InvalidArgument, unix.EBUSY: codes.FailedPrecondition, unix.ENODEV: codes.FailedPrecondition, unix.ENETUNREACH: codes.FailedPrecondition, unix.ENOSPC: codes.ResourceExhausted,
	unix.EFBIG: codes.ResourceExhausted, unix.ENOMEM: codes.ResourceExhausted,
}
