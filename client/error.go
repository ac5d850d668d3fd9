package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ErrNotRunning says that no msbd listens on the admin socket, or at the server's URL.
var ErrNotRunning = errors.New("msbd is not running")

// classes maps the server's answers to errors that callers can tell apart.
var classes = map[codes.Code]error{
	codes.NotFound:           errdefs.ErrNotFound,
	codes.AlreadyExists:      errdefs.ErrAlreadyExists,
	codes.FailedPrecondition: errdefs.ErrFailedPrecondition,
	codes.InvalidArgument:    errdefs.ErrInvalidArgument,
	codes.ResourceExhausted:  errdefs.ErrResourceExhausted,
	codes.Unavailable:        errdefs.ErrUnavailable,
	codes.PermissionDenied:   errdefs.ErrPermissionDenied,
	codes.Unauthenticated:    errdefs.ErrUnauthenticated,
	codes.DataLoss:           errdefs.ErrDataLoss,
	codes.DeadlineExceeded:   context.DeadlineExceeded,
	codes.Canceled:           context.Canceled,
}

// serverError is what the server said, without gRPC's words around it.
type serverError struct {
	text  string
	class error
}

func (e *serverError) Error() string { return e.text }
func (e *serverError) Unwrap() error { return e.class }

// tooOld is the error of a server that is older than this program.
func tooOld(what string) error {
	return &serverError{
		text: "msbd is older than msb: it " + what + ". Restart it with the msbd that belongs to this msb ('msb server stop', then " +
			"'msb server start'; or 'systemctl restart msbd'); sandboxes run on meanwhile",
		class: errdefs.ErrNotImplemented,
	}
}

// explain turns gRPC's error into one that says what to do about it.
func (a *Admin) explain(err error) error {
	a.mu.Lock()
	dialErr, socket := a.dialErr, a.socket()
	a.mu.Unlock()
	s := status.Convert(err)
	if s.Code() == codes.Unavailable && dialErr != nil {
		return explainDial(socket, dialErr)
	}
	if s.Code() == codes.Unimplemented {
		return tooOld("does not know this request")
	}
	class, known := classes[s.Code()]
	if !known {
		class = errdefs.ErrInternal
	}
	return &serverError{text: s.Message(), class: class}
}

func explainDial(socket string, err error) error {
	switch {
	case errors.Is(err, syscall.ENOENT):
		return fmt.Errorf("%w: nothing listens on %s. Start it with 'msb server start', or name its socket with "+
			"--socket or MSB_SOCKET", ErrNotRunning, socket)
	case errors.Is(err, syscall.ECONNREFUSED): // who stops takes the socket away
		return fmt.Errorf("%w: nothing listens on %s, which a server left that crashed or was killed. Its log says more "+
			"('journalctl --unit msbd', or msbd.log in its state directory); sandboxes run on. Start it again with 'msb server start'",
			ErrNotRunning, socket)
	case errors.Is(err, fs.ErrPermission):
		return &serverError{
			text: fmt.Sprintf("%s: permission denied. Run as root (sudo), or have yourself added to the group that may "+
				"administer msbd ('sudo usermod -aG msb $USER', then log in again)", socket),
			class: errdefs.ErrPermissionDenied,
		}
	default:
		return fmt.Errorf("connect to msbd: %w", err)
	}
}
