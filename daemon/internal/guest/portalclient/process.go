package portalclient

import (
	"context"
	"io"

	"google.golang.org/grpc"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// kind says which events a stream has, and what its errors mean.
type kind int

const (
	run       kind = iota // output and an exit, as of a command
	inContext             // of RunCode: the same and pieces, but the error NOT_FOUND means the context
	started               // of StartProcess: also a start, at the beginning
	attached              // of AttachProcess: the same, but the error NOT_FOUND means the process
	snapshot              // of AttachProcess with NoFollow: the same, but the exit may be missing
)

// process is a stream of events. It implements sandbox.Process.
type process[Response any] struct {
	ctx    context.Context // of the stream; its error, if any, is why the stream ended
	cancel context.CancelFunc
	stream grpc.ServerStreamingClient[Response]
	event  func(*Response) sandbox.Event
	kind   kind
	begun  bool // the start has been received, if there is one
	ended  bool // the last event has been received
}

// start opens a stream of events with call. An error of call means that nothing was sent: gRPC reports what happens later when
// the stream is read. Closing the returned process cancels the stream.
func start[Response any](ctx context.Context, call func(context.Context) (grpc.ServerStreamingClient[Response], error),
	event func(*Response) sandbox.Event, kind kind,
) (sandbox.Process, error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := call(ctx)
	if err != nil {
		err = connectionError(ctx, err)
		cancel()
		return nil, err
	}
	return &process[Response]{ctx: ctx, cancel: cancel, stream: stream, event: event, kind: kind, begun: kind == run || kind == inContext}, nil
}

// Next implements sandbox.Process.
func (p *process[Response]) Next() (sandbox.Event, error) {
	if p.ended {
		return nil, io.EOF
	}
	response, err := p.stream.Recv()
	if err == io.EOF && p.kind == snapshot && p.begun {
		p.ended = true
		return nil, io.EOF
	}
	if err == io.EOF {
		return nil, classified{"the sandbox ended the run without a result", sandbox.ErrRunFailed}
	}
	if err != nil {
		return nil, p.error(err)
	}
	switch event := p.event(response).(type) {
	case sandbox.Started:
		if p.begun {
			break
		}
		p.begun = true
		return event, nil
	case sandbox.Output, sandbox.Piece:
		if !p.begun {
			break
		}
		return event, nil
	case sandbox.Exit:
		if !p.begun {
			break
		}
		return p.last(event)
	}
	return nil, classified{"the sandbox sent the events of a process in the wrong order", sandbox.ErrRunFailed}
}

// processEvent returns an event of a process, or nil.
func processEvent(e *portalv1.ProcessEvent) sandbox.Event {
	switch event := e.GetEvent().(type) {
	case *portalv1.ProcessEvent_Started:
		return sandbox.Started{PID: event.Started.GetPid(), SkippedBytes: event.Started.GetSkippedBytes()}
	case *portalv1.ProcessEvent_Output:
		return outputEvent(event.Output)
	case *portalv1.ProcessEvent_Exit:
		return exit(event.Exit)
	}
	return nil
}

// stream returns a stream of output. Every number that no portal sends is stdout.
func stream(s portalv1.Output_Stream) sandbox.Stream {
	switch s {
	case portalv1.Output_STREAM_STDERR:
		return sandbox.Stderr
	case portalv1.Output_STREAM_TERMINAL:
		return sandbox.Terminal
	default:
		return sandbox.Stdout
	}
}

// last returns the exit if it is the last message and the call succeeds.
func (p *process[Response]) last(exit sandbox.Exit) (sandbox.Event, error) {
	if _, err := p.stream.Recv(); err == nil {
		return nil, classified{"the sandbox sent more after the run's result", sandbox.ErrRunFailed}
	} else if err != io.EOF {
		return nil, p.error(err)
	}
	p.ended = true
	return exit, nil
}

func (p *process[Response]) error(err error) error {
	if p.kind == run || p.kind == started {
		return startError(p.ctx, err)
	}
	return callError(p.ctx, err)
}

// Close implements sandbox.Process.
func (p *process[Response]) Close() error {
	p.cancel()
	return nil
}

func exit(e *portalv1.ProcessExit) sandbox.Exit {
	return sandbox.Exit{
		Code: int(e.GetExitCode()), Signal: int(e.GetSignal()), TimedOut: e.GetTimedOut(), Reason: bounded.Text(e.GetReason(), maxErrorText),
	}
}
