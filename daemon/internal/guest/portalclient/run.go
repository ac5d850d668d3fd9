package portalclient

import (
	"cmp"
	"context"
	"crypto/rand"

	"google.golang.org/grpc"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// languages are the portal's names of languages. An unknown language is LANGUAGE_UNSPECIFIED, which the portal refuses.
var languages = map[sandbox.Language]portalv1.RunCodeRequest_Language{
	sandbox.Python: portalv1.RunCodeRequest_LANGUAGE_PYTHON,
	sandbox.Node:   portalv1.RunCodeRequest_LANGUAGE_NODE,
	sandbox.Bash:   portalv1.RunCodeRequest_LANGUAGE_BASH,
}

// RunCode implements sandbox.Portal. If code.Timeout is 0 or negative, the run has no time limit.
func (c *Client) RunCode(ctx context.Context, code sandbox.Code) (sandbox.Process, error) {
	if err := c.checkOptions(code.RunOptions); err != nil {
		return nil, err
	}
	if code.Context != "" || code.Results || code.Language == sandbox.Bash {
		if err := c.checkContract(contexts); err != nil {
			return nil, err
		}
	}
	if code.Rehearsal {
		if err := c.checkContract(rehearsal); err != nil {
			return nil, err
		}
	}
	grace := code.Grace
	if c.contract.Load() >= processes {
		grace = cmp.Or(grace, code.DefaultGrace)
	}
	id := ""
	if code.Interrupts != nil && c.contract.Load() >= interrupt {
		id = rand.Text()
	} else if code.Interrupts != nil {
		ctx = endedBy(ctx, code.Interrupts)
	}
	return start(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[portalv1.RunCodeResponse], error) {
		stream, err := c.runs.RunCode(ctx, &portalv1.RunCodeRequest{
			Id:          id,
			Context:     code.Context,
			Language:    languages[code.Language],
			Code:        code.Text,
			Results:     code.Results,
			Timeout:     duration(code.Timeout),
			Waited:      duration(code.Waited),
			Environment: environment(code.Environment),
			Env:         code.Env,
			Cwd:         code.Cwd,
			User:        code.User,
			Input:       code.Input,
			Grace:       duration(grace),
			Rehearsal:   code.Rehearsal,
		})
		if err == nil && id != "" {
			go c.forwardInterrupts(ctx, stream, id, code.Interrupts)
		}
		return stream, err
	}, codeEvent, inContext)
}

// forwardInterrupts interrupts the run of a stream for each value from interrupts. It returns when ctx, the context of the stream,
// has ended. An interrupt of a run that has just ended has no effect.
func (c *Client) forwardInterrupts(ctx context.Context, stream grpc.ServerStreamingClient[portalv1.RunCodeResponse], id string, interrupts <-chan struct{}) {
	// The portal sends the header as soon as it knows the run. There is none if the call has failed.
	if header, err := stream.Header(); header == nil || err != nil {
		return
	}
	for {
		select {
		case <-interrupts:
			_, _ = c.runs.InterruptRun(ctx, &portalv1.InterruptRunRequest{Id: id})
		case <-ctx.Done():
			return
		}
	}
}

// errCanceled is the error of an interrupted run whose portal is that of an earlier version.
var errCanceled = classified{"the run was canceled, because the sandbox was started by an earlier version of msbd, whose runs do not go on after an interrupt",
	sandbox.ErrRunFailed}

// endedBy returns a context that also ends, with errCanceled, when a value comes from interrupts.
func endedBy(ctx context.Context, interrupts <-chan struct{}) context.Context {
	ended, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-interrupts:
			cancel(errCanceled)
		case <-ctx.Done():
			cancel(context.Cause(ctx))
		}
	}()
	return ended
}

// codeEvent returns the event in a response of RunCode, or nil.
func codeEvent(response *portalv1.RunCodeResponse) sandbox.Event {
	switch event := response.GetEvent().(type) {
	case *portalv1.RunCodeResponse_Output:
		return outputEvent(event.Output)
	case *portalv1.RunCodeResponse_Display:
		return piece(event.Display, false)
	case *portalv1.RunCodeResponse_Error:
		return piece(event.Error, true)
	case *portalv1.RunCodeResponse_Result:
		exit := sandbox.Exit{
			Code: int(event.Result.GetExitCode()), Runs: event.Result.GetCount(), StateLost: event.Result.GetStateLost(),
		}
		if !event.Result.GetSuccess() && exit.Code == 0 { // the portal of an earlier version reports no code
			exit.Code = 1
		}
		return exit
	}
	return nil
}

func piece(p *portalv1.Piece, isError bool) sandbox.Event {
	return sandbox.Piece{Error: isError, Data: p.GetData(), First: p.GetFirst(), Last: p.GetLast()}
}

// RunCommand implements sandbox.Portal. If command.Timeout is 0 or negative, the run has no time limit.
func (c *Client) RunCommand(ctx context.Context, command sandbox.Command) (sandbox.Process, error) {
	if err := c.checkOptions(command.RunOptions); err != nil {
		return nil, err
	}
	return start(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[portalv1.RunCommandResponse], error) {
		return c.runs.RunCommand(ctx, &portalv1.RunCommandRequest{
			Command:     command.Program,
			Args:        command.Args,
			Timeout:     duration(command.Timeout),
			Environment: environment(command.Environment),
			Env:         command.Env,
			Cwd:         command.Cwd,
			User:        command.User,
			Input:       command.Input,
			Grace:       duration(command.Grace),
		})
	}, commandEvent, run)
}

// commandEvent returns the event in a response of RunCommand, or nil.
func commandEvent(response *portalv1.RunCommandResponse) sandbox.Event {
	switch event := response.GetEvent().(type) {
	case *portalv1.RunCommandResponse_Output:
		return outputEvent(event.Output)
	case *portalv1.RunCommandResponse_Result:
		return sandbox.Exit{Code: int(event.Result.GetExitCode())}
	}
	return nil
}

// checkOptions returns an error if a request uses options that the portal does not support.
func (c *Client) checkOptions(o sandbox.RunOptions) error {
	if len(o.Env) > 0 || o.Cwd != "" || o.User != "" || len(o.Input) > 0 || o.Grace != 0 {
		return c.checkContract(processes)
	}
	return nil
}

func outputEvent(out *portalv1.Output) sandbox.Event {
	return sandbox.Output{Stream: stream(out.GetStream()), Data: out.GetData()}
}
