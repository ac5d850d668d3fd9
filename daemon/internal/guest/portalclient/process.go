package portalclient

import (
	"context"
	"io"

	"google.golang.org/grpc"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// event is a message of a run's stream. It is output or, as the last message, the result.
type event[E any] interface {
	*E
	GetOutput() *portalv1.Output
}

// process is a run whose events arrive over a gRPC stream. It implements sandbox.Process.
type process[E any, P event[E]] struct {
	ctx    context.Context // of the stream; its error, if any, is why the stream ended
	cancel context.CancelFunc
	stream grpc.ServerStreamingClient[E]
	// exitCode returns the exit code in a result.
	exitCode func(*E) int
	ended    bool // the result has been received
}

// start starts a run with call. An error of call means that nothing was sent: gRPC reports what happens later when the
// stream is read. Closing the returned process cancels the stream, which interrupts the run.
func start[E any, P event[E]](ctx context.Context, call func(context.Context) (grpc.ServerStreamingClient[E], error), exitCode func(*E) int) (sandbox.Process, error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := call(ctx)
	if err != nil {
		err = connectionError(ctx, err)
		cancel()
		return nil, err
	}
	return &process[E, P]{ctx: ctx, cancel: cancel, stream: stream, exitCode: exitCode}, nil
}

// Next implements sandbox.Process.
func (p *process[E, P]) Next() (sandbox.Event, error) {
	if p.ended {
		return nil, io.EOF
	}
	message, err := p.stream.Recv()
	if err == io.EOF {
		return nil, classified{"the sandbox ended the run without a result", sandbox.ErrRunFailed}
	}
	if err != nil {
		return nil, runError(p.ctx, err)
	}
	if out := P(message).GetOutput(); out != nil {
		stream := sandbox.Stdout
		if out.GetStream() == portalv1.Output_STREAM_STDERR {
			stream = sandbox.Stderr
		}
		return sandbox.Output{Stream: stream, Data: out.GetData()}, nil
	}
	// The result counts only if it is the last message and the call succeeds.
	if _, err := p.stream.Recv(); err == nil {
		return nil, classified{"the sandbox sent more after the run's result", sandbox.ErrRunFailed}
	} else if err != io.EOF {
		return nil, runError(p.ctx, err)
	}
	p.ended = true
	return sandbox.Exit{Code: p.exitCode(message)}, nil
}

// Close implements sandbox.Process.
func (p *process[E, P]) Close() error {
	p.cancel()
	return nil
}
