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
		err := GRPC(fmt.Errorf("create key: %w", class))
		if got := status.Code(err); got != want {
			t.Errorf("GRPC(%v) has code %s, want %s", class, got, want)
		}
	}
	if err := GRPC(fmt.Errorf("sandbox x does not exist: %w", errdefs.ErrNotFound)); status.Convert(err).Message() != "sandbox x does not exist" {
		t.Errorf("message is %q, want it without the class", status.Convert(err).Message())
	}
	if got := status.Convert(GRPC(fmt.Errorf("the store is damaged: %w", errdefs.ErrDataLoss))); got.Code() != codes.DataLoss || got.Message() != "the store is damaged" {
		t.Errorf("data loss became %v", got)
	}
	original := status.Error(codes.DataLoss, "unchanged")
	if GRPC(original) != original || GRPC(nil) != nil {
		t.Error("GRPC changed a status or nil")
	}
}
