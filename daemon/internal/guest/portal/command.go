package portal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// defaultPath is the PATH of an environment that has none.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// RunCommand implements portalv1.PortalServiceServer.
func (s *server) RunCommand(req *portalv1.RunCommandRequest, stream grpc.ServerStreamingServer[portalv1.RunCommandResponse]) error {
	if req.GetCommand() == "" {
		return status.Error(codes.InvalidArgument, "command is empty: name a program")
	}
	env, dir, err := processEnvironment(req.GetEnvironment())
	if err != nil {
		return err
	}
	path, err := lookPath(req.GetCommand(), env, dir)
	if err != nil {
		return err
	}

	out, outEnd, errEnd, err := newOutput(func(from portalv1.Output_Stream, data []byte) error {
		return stream.Send(&portalv1.RunCommandResponse{Event: &portalv1.RunCommandResponse_Output{
			Output: &portalv1.Output{Stream: from, Data: data},
		}})
	}, s.discard)
	if err != nil {
		return startError(req.GetCommand(), "", err)
	}
	argv := append([]string{req.GetCommand()}, req.GetArgs()...)
	p, err := s.children.start(path, argv, env, dir, s.null, outEnd, errEnd)
	outEnd.Close()
	errEnd.Close()
	if err != nil {
		return startError(req.GetCommand(), path, err)
	}

	ctx, cancel := withLimit(stream.Context(), req.GetTimeout())
	defer cancel()
	select {
	case <-p.exited:
	case <-ctx.Done():
		p.signalGroup(syscall.SIGKILL)
		<-p.exited
		err = endError(ctx)
	}
	if why := p.outOfMemory(); why != "" && err == nil {
		out.drain()
		out.report("killed: " + why)
	}
	out.finish()
	if err != nil {
		return err
	}
	return stream.Send(&portalv1.RunCommandResponse{Event: &portalv1.RunCommandResponse_Result{
		Result: &portalv1.CommandResult{ExitCode: exitCode(p.status)},
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

// withLimit returns a context that ends after timeout. A timeout that is nil, zero or negative means no limit.
func withLimit(ctx context.Context, timeout *durationpb.Duration) (context.Context, context.CancelFunc) {
	if d := timeout.AsDuration(); d > 0 {
		return context.WithTimeoutCause(ctx, d, limitError{d})
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

// processEnvironment returns the environment and the working directory for a process. e overrides the portal's
// environment and working directory, which come from the image. An empty dir means the portal's working directory.
func processEnvironment(e *portalv1.Environment) (env []string, dir string, err error) {
	env = os.Environ()
	for _, entry := range e.GetEnv() {
		name, _, ok := strings.Cut(entry, "=")
		if !ok || name == "" || strings.ContainsRune(entry, 0) {
			return nil, "", status.Errorf(codes.InvalidArgument, "environment entry %q is invalid: use NAME=value", entry)
		}
		env = setenv(env, name, entry)
	}
	dir = e.GetWorkdir()
	if dir == "" {
		return env, "", nil
	}
	if !filepath.IsAbs(dir) {
		return nil, "", status.Errorf(codes.InvalidArgument, "workdir %q is not absolute: use an absolute path", dir)
	}
	var problem string
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		problem = "does not exist in the sandbox"
	case err != nil:
		problem = "cannot be used: " + errors.Unwrap(err).Error()
	case !info.IsDir():
		problem = "is not a directory"
	default:
		return env, dir, nil
	}
	// The request of the run is right. The workdir is in the sandbox's configuration, or a run has removed it.
	return nil, "", status.Errorf(codes.FailedPrecondition,
		"workdir %q %s: stop the sandbox and start it with another workdir, or none", dir, problem)
}

// setenv replaces the entry of the variable name in env with entry, or appends entry.
func setenv(env []string, name, entry string) []string {
	for i, old := range env {
		if strings.HasPrefix(old, name+"=") {
			env[i] = entry
			return env
		}
	}
	return append(env, entry)
}

func getenv(env []string, name string) (value string, ok bool) {
	for _, entry := range env {
		if v, found := strings.CutPrefix(entry, name+"="); found {
			return v, true
		}
	}
	return "", false
}
