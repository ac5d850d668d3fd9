package portal

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// RunCommand implements portalv1.PortalServiceServer.
func (s *server) RunCommand(req *portalv1.RunCommandRequest, stream grpc.ServerStreamingServer[portalv1.RunCommandResponse]) error {
	p, r, err := s.programs.run(stream.Context(), &portalv1.StartProcessRequest{
		Argv: append([]string{req.GetCommand()}, req.GetArgs()...), Environment: req.GetEnvironment(), Env: req.GetEnv(),
		Cwd: req.GetCwd(), User: req.GetUser(), Input: req.GetInput(), Timeout: req.GetTimeout(), Grace: req.GetGrace(),
	})
	if err != nil {
		return err
	}
	_, err = p.follow(stream.Context(), r, func(uint64) error { return nil }, func(from portalv1.Output_Stream, data []byte) error {
		return stream.Send(&portalv1.RunCommandResponse{Event: &portalv1.RunCommandResponse_Output{
			Output: &portalv1.Output{Stream: from, Data: data},
		}})
	})
	if err != nil {
		return err
	}
	if p.exit.GetTimedOut() {
		return status.Error(codes.DeadlineExceeded, limitError{req.GetTimeout().AsDuration()}.Error())
	}
	return stream.Send(&portalv1.RunCommandResponse{Event: &portalv1.RunCommandResponse_Result{
		Result: &portalv1.CommandResult{ExitCode: p.exit.GetExitCode()},
	}})
}

// exitCode returns the exit code as a shell reports it. It is 128+N for a process that was killed by signal N.
func exitCode(s syscall.WaitStatus) int32 {
	if s.Signaled() {
		return 128 + int32(s.Signal())
	}
	return int32(s.ExitStatus())
}

// limitError is the cancellation cause of a run that reached its time limit.
type limitError struct{ limit time.Duration }

func (e limitError) Error() string {
	return fmt.Sprintf("the run reached its time limit of %s and was interrupted", e.limit)
}

// withLimit returns a context that ends timeout after begin. A timeout that is nil, zero or negative means no limit.
func withLimit(ctx context.Context, timeout *durationpb.Duration, begin time.Time) (context.Context, context.CancelFunc) {
	if d := timeout.AsDuration(); d > 0 {
		return context.WithDeadlineCause(ctx, begin.Add(d), limitError{d})
	}
	return context.WithCancel(ctx)
}

// endError returns the gRPC status for a run whose context, from withLimit, is done.
func endError(ctx context.Context) error {
	if e := (limitError{}); errors.As(context.Cause(ctx), &e) {
		return status.Error(codes.DeadlineExceeded, e.Error())
	}
	return status.FromContextError(ctx.Err()).Err()
}
