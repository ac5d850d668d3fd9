package rpcerr

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

func TestJSONRPC(t *testing.T) {
	own := &rpc.Error{Code: rpc.CodeParse, Message: "no JSON"}
	for _, c := range []struct {
		err     error
		code    rpc.Code
		status  int
		message string
	}{
		{errdefs.ErrNotFound, rpc.CodeNotFound, 404, "it is so"},
		{errdefs.ErrAlreadyExists, rpc.CodeConflict, 409, "it is so"},
		{errdefs.ErrFailedPrecondition, rpc.CodeConflict, 409, "it is so"},
		{errdefs.ErrConflict, rpc.CodeConflict, 409, "it is so"},
		{errdefs.ErrInvalidArgument, rpc.CodeInvalidParams, 400, "it is so"},
		{errdefs.ErrResourceExhausted, rpc.CodeExhausted, 429, "it is so"},
		{errdefs.ErrUnavailable, rpc.CodeUnavailable, 503, "it is so"},
		{errdefs.ErrPermissionDenied, rpc.CodePermissionDenied, 403, "it is so"},
		{errdefs.ErrUnauthenticated, rpc.CodeUnauthenticated, 401, "it is so"},
		{sandbox.ErrRunTimeout, rpc.CodeRunTimeout, 504, "it is so: time limit of the run reached"},
		{sandbox.ErrCommandNotFound, rpc.CodeCommandNotFound, 422, "it is so: command not found"},
		{context.Canceled, rpc.CodeUnavailable, 503, "the request was cut short because the server is stopping; try again in a moment"},
		{errors.New("a secret"), rpc.CodeInternal, 500, "internal error; the server's log has the cause under request id R"},
		{errdefs.ErrInternal, rpc.CodeInternal, 500, "internal error; the server's log has the cause under request id R"},
		{own, rpc.CodeParse, 400, "no JSON"},
	} {
		got := JSONRPC(fmt.Errorf("it is so: %w", c.err), "R")
		if got.Code != c.code || HTTPStatus(got.Code) != c.status || got.Message != c.message {
			t.Errorf("%v became %d %+v", c.err, HTTPStatus(got.Code), got)
		}
		var data *rpc.ErrorData
		switch {
		case c.code == rpc.CodeInternal:
			data = &rpc.ErrorData{RequestID: "R"}
		case c.code == rpc.CodeExhausted || c.code == rpc.CodeUnavailable:
			data = &rpc.ErrorData{RetryAfter: 1}
		}
		if diff := cmp.Diff(data, got.Data); diff != "" {
			t.Errorf("%v has data\n%s", c.err, diff)
		}
	}
}
