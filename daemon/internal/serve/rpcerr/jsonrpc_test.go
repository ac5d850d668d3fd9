package rpcerr

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

func TestJSONRPC(t *testing.T) {
	rpcError := &rpc.Error{Code: rpc.CodeParse, Message: "invalid JSON"}
	for _, c := range []struct {
		err     error
		code    rpc.Code
		status  int
		message string
	}{
		{errdefs.ErrNotFound, rpc.CodeNotFound, 404, "it failed"},
		{errdefs.ErrAlreadyExists, rpc.CodeConflict, 409, "it failed"},
		{errdefs.ErrFailedPrecondition, rpc.CodeConflict, 409, "it failed"},
		{errdefs.ErrConflict, rpc.CodeConflict, 409, "it failed"},
		{errdefs.ErrInvalidArgument, rpc.CodeInvalidParams, 400, "it failed"},
		{errdefs.ErrResourceExhausted, rpc.CodeExhausted, 429, "it failed"},
		{errdefs.ErrUnavailable, rpc.CodeUnavailable, 503, "it failed"},
		{errdefs.ErrPermissionDenied, rpc.CodePermissionDenied, 403, "it failed"},
		{errdefs.ErrUnauthenticated, rpc.CodeUnauthenticated, 401, "it failed"},
		{sandbox.ErrNoSpace, rpc.CodeExhausted, 429, "it failed: the server's disk is almost full"},
		{&sandbox.Refusal{}, rpc.CodeExhausted, 429, "it failed: "},
		{&sandbox.Refusal{RetryAfter: 5 * time.Second}, rpc.CodeExhausted, 429, "it failed: "},
		{sandbox.ErrSandboxFull, rpc.CodeExhausted, 429, "it failed: the sandbox's disk is full"},
		{sandbox.ErrRunTimeout, rpc.CodeRunTimeout, 504, "it failed: time limit of the run reached"},
		{sandbox.ErrCommandNotFound, rpc.CodeCommandNotFound, 422, "it failed: command not found"},
		{sandbox.ErrRunFailed, rpc.CodeRunFailed, 502, "it failed: run failed"},
		{errors.Join(sandbox.ErrRunFailed, ErrStopping), rpc.CodeRunFailed, 502, "it failed: run failed\nthe server is stopping"},
		{errors.Join(sandbox.ErrRunFailed, errdefs.ErrUnavailable), rpc.CodeRunFailed, 502, "it failed: run failed\nunavailable"},
		{ErrStopping, rpc.CodeUnavailable, 503, "the request was cut short because the server is stopping; try again in a moment"},
		{context.Canceled, rpc.CodeInvalidRequest, 400, "the request was canceled, because the client closed its side of the connection; keep it open until the response"},
		{errdefs.ErrDataLoss, rpc.CodeInternal, 500, "internal error; the server's log has the cause under request id R"},
		{sandbox.ErrCommandNotExecutable, rpc.CodeCommandNotExecutable, 422, "it failed: command cannot be run"},
		{errors.New("a secret"), rpc.CodeInternal, 500, "internal error; the server's log has the cause under request id R"},
		{errdefs.ErrInternal, rpc.CodeInternal, 500, "internal error; the server's log has the cause under request id R"},
		{rpcError, rpc.CodeParse, 400, "invalid JSON"},
	} {
		got := JSONRPC(fmt.Errorf("it failed: %w", c.err), "R")
		if got.Code != c.code || HTTPStatus(got.Code) != c.status || got.Message != c.message {
			t.Errorf("JSONRPC(%v) is status %d, error %+v; want %d, %d, %q", c.err, HTTPStatus(got.Code), got, c.status, c.code, c.message)
		}
		var data *rpc.ErrorData
		refusal, isRefusal := c.err.(*sandbox.Refusal)
		switch {
		case isRefusal && refusal.RetryAfter == 0: // trying again does not help
		case isRefusal:
			data = &rpc.ErrorData{RetryAfter: 5}
		case c.err == sandbox.ErrNoSpace, c.err == sandbox.ErrSandboxFull: // trying again does not help
		case c.code == rpc.CodeInternal:
			data = &rpc.ErrorData{RequestID: "R"}
		case c.code == rpc.CodeExhausted || c.code == rpc.CodeUnavailable:
			data = &rpc.ErrorData{RetryAfter: 1}
		}
		if diff := cmp.Diff(data, got.Data); diff != "" {
			t.Errorf("JSONRPC(%v): data differs (-want +got):\n%s", c.err, diff)
		}
	}
}

// A message quotes at most a few KiB of what a client or a sandbox sent, whatever the class of the error.
func TestMessagesAreBounded(t *testing.T) {
	huge := strings.Repeat("\x1b<\"", 1<<20)
	for _, class := range append(slices.Clone(classes), sandbox.ErrRunTimeout, sandbox.ErrCommandNotFound, sandbox.ErrRunFailed, errors.New("no class")) {
		e := JSONRPC(fmt.Errorf("%s: %w", huge, class), "R")
		var out strings.Builder
		if err := WriteResponse(&out, nil, e, nil); err != nil {
			t.Fatal(err)
		}
		if out.Len() > maxMessage+200 || strings.Contains(out.String(), "\x1b") {
			t.Errorf("%v: response of %d bytes: %.100q", class, out.Len(), out.String())
		}
	}
}
