package rpcerr

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestGRPC(t *testing.T) {
	for class, want := range map[error]codes.Code{
		errdefs.ErrNotFound:           codes.NotFound,
		errdefs.ErrAlreadyExists:      codes.AlreadyExists,
		errdefs.ErrFailedPrecondition: codes.FailedPrecondition,
		errdefs.ErrConflict:           codes.FailedPrecondition,
		errdefs.ErrInvalidArgument:    codes.InvalidArgument,
		errdefs.ErrResourceExhausted:  codes.ResourceExhausted,
		errdefs.ErrUnavailable:        codes.Unavailable,
		errdefs.ErrPermissionDenied:   codes.PermissionDenied,
		errdefs.ErrUnauthenticated:    codes.Unauthenticated,
		context.DeadlineExceeded:      codes.DeadlineExceeded,
		context.Canceled:              codes.Canceled,
		errors.New("disk on fire"):    codes.Internal,
	} {
		err := GRPC(fmt.Errorf("make key: %w", class))
		if got := status.Code(err); got != want {
			t.Errorf("%v became %s, want %s", class, got, want)
		}
	}
	if err := GRPC(fmt.Errorf("sandbox x does not exist: %w", errdefs.ErrNotFound)); status.Convert(err).Message() != "sandbox x does not exist" {
		t.Errorf("the text is %q", status.Convert(err).Message())
	}
	as := status.Error(codes.DataLoss, "as it is")
	if GRPC(as) != as || GRPC(nil) != nil {
		t.Error("a status or nil was changed")
	}
}
