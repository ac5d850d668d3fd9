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

	"golang.org/x/sys/unix"
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
		return status.Error(codes.NotFound, err.Error())
	}

	out, outEnd, errEnd, err := newOutput(func(from portalv1.Output_Stream, data []byte) error {
		return stream.Send(&portalv1.RunCommandResponse{Event: &portalv1.RunCommandResponse_Output{
			Output: &portalv1.Output{Stream: from, Data: data},
		}})
	})
	if err != nil {
		return status.Errorf(codes.ResourceExhausted, "run %q: %v", req.GetCommand(), err)
	}
	argv := append([]string{req.GetCommand()}, req.GetArgs()...)
	p, err := s.children.start(path, argv, env, dir, s.null, outEnd, errEnd)
	outEnd.Close()
	errEnd.Close()
	if err != nil {
		return startError(req.GetCommand(), err)
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
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, "", status.Errorf(codes.InvalidArgument, "workdir %q does not exist in the sandbox", dir)
	case err != nil:
		return nil, "", status.Errorf(codes.InvalidArgument, "workdir %q: %v", dir, errors.Unwrap(err))
	case !info.IsDir():
		return nil, "", status.Errorf(codes.InvalidArgument, "workdir %q is not a directory", dir)
	}
	return env, dir, nil
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

// lookPath finds the program name as a shell does. A name with a slash is a path, relative to dir. For any other name,
// lookPath searches the directories in the PATH of env.
func lookPath(name string, env []string, dir string) (string, error) {
	fromDir := func(path string) string {
		if filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(dir, path)
	}
	if strings.Contains(name, "/") {
		path := fromDir(name)
		if !filepath.IsAbs(path) {
			path = "./" + path
		}
		if err := checkExecutable(path); err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		return path, nil
	}
	list, ok := getenv(env, "PATH")
	if !ok {
		list = defaultPath
	}
	notFound := fmt.Errorf("%s is not in PATH (%s)", name, list)
	for _, d := range filepath.SplitList(list) {
		if d == "" {
			d = "."
		}
		path := filepath.Join(fromDir(d), name)
		err := checkExecutable(path)
		if err == nil {
			return path, nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			notFound = fmt.Errorf("%s: %w", path, err)
		}
	}
	return "", notFound
}

// checkExecutable returns an error unless the file at path can be run. It returns os.ErrNotExist if there is no such
// file.
func checkExecutable(path string) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
		return os.ErrNotExist
	case err != nil:
		return errors.Unwrap(err)
	case info.IsDir():
		return errors.New("is a directory")
	case unix.Access(path, unix.X_OK) != nil:
		return errors.New("is not executable")
	}
	return nil
}

// startError returns the gRPC status for an error of fork, chdir or exec.
func startError(command string, err error) error {
	code, text := codes.Internal, err.Error()
	switch err {
	case syscall.ENOENT:
		code, text = codes.NotFound, "the image lacks the interpreter or loader that this program needs"
	case syscall.ENOEXEC:
		code, text = codes.NotFound, "the sandbox cannot run this file: it is for another architecture, or a script without a #! line"
	case syscall.EACCES, syscall.EPERM:
		code, text = codes.NotFound, "is not executable"
	case syscall.E2BIG:
		code, text = codes.InvalidArgument, "arguments and environment are too long"
	case syscall.EINVAL:
		code, text = codes.InvalidArgument, "an argument contains a NUL byte"
	case syscall.EAGAIN, syscall.ENOMEM:
		code, text = codes.ResourceExhausted, "the sandbox cannot start another process: "+text
	}
	return status.Errorf(code, "%s: %s", command, text)
}
