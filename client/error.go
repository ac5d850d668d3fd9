package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/user"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ErrNotRunning is returned when no msbd listens on the admin socket or at the server's URL.
var ErrNotRunning = errors.New("msbd is not running")

// grpcClasses maps the status codes of the server to the errors that callers can test for.
var grpcClasses = map[codes.Code]error{
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

// classError is an error that belongs to a class of errors. The class is not part of the message.
type classError struct {
	err, class error
}

func (e *classError) Error() string   { return e.err.Error() }
func (e *classError) Unwrap() []error { return []error{e.err, e.class} }

// errorf is like fmt.Errorf, but the error also matches class.
func errorf(class error, format string, args ...any) error {
	return &classError{fmt.Errorf(format, args...), class}
}

// tooOld returns the error for a server that is older than this program. what completes the sentence "it …".
func tooOld(what string) error {
	return errorf(errdefs.ErrNotImplemented, "msbd is older than msb: it %s. Restart it with the msbd that belongs to this msb "+
		"('msb server stop', then 'msb server start'; or 'systemctl restart msbd'); sandboxes keep running", what)
}

// explain converts an error of gRPC into one that says what to do.
func (a *Admin) explain(err error) error {
	a.mu.Lock()
	dialErr, socket := a.dialErr, a.socket()
	a.mu.Unlock()
	s := status.Convert(err)
	if s.Code() == codes.Unavailable && dialErr != nil {
		return explainDial(socket, dialErr)
	}
	if s.Code() == codes.Unimplemented {
		return tooOld("does not support this request")
	}
	if s.Code() == codes.Unavailable && strings.HasPrefix(s.Message(), "error reading from server") { // gRPC's own text
		return errorf(errdefs.ErrUnavailable, "msbd closed the connection before it answered; see 'msb server status' and its log")
	}
	class, known := grpcClasses[s.Code()]
	if !known {
		class = errdefs.ErrInternal
	}
	return errorf(class, "%s", s.Message())
}

// JoinGroup returns the commands that let this user administer msbd without being root.
func JoinGroup() string {
	name := "$USER"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	const join = "run 'sudo usermod -aG msb %s', then log in again"
	if _, err := user.LookupGroup("msb"); err != nil {
		return fmt.Sprintf("there is no group msb yet: run 'sudo groupadd --system msb', restart the server, "+join, name)
	}
	return fmt.Sprintf(join, name)
}

func explainDial(socket string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: nothing listens on %s. Start it with 'msb server start', or give its socket with "+
			"--socket or MSB_SOCKET", ErrNotRunning, socket)
	case errors.Is(err, errConnectionRefused): // a server that stops removes its socket
		return fmt.Errorf("%w: nothing listens on %s; the server crashed or was killed. See its log ('journalctl --unit msbd', "+
			"or msbd.log in its state directory). Sandboxes keep running; start the server again with 'msb server start'",
			ErrNotRunning, socket)
	case errors.Is(err, fs.ErrPermission):
		return errorf(errdefs.ErrPermissionDenied, "%s: permission denied. Run msb as root (sudo), or join the group that may "+
			"administer msbd: %s", socket, JoinGroup())
	default:
		return fmt.Errorf("connect to msbd: %w", err)
	}
}
