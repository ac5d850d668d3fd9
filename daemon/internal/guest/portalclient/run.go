package portalclient

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// RunCode implements sandbox.Portal. If code.Timeout is 0 or negative, the run has no time limit.
func (c *Client) RunCode(ctx context.Context, code sandbox.Code) (sandbox.Process, error) {
	if err := c.checkOptions(code.RunOptions); err != nil {
		return nil, err
	}
	languages := map[sandbox.Language]portalv1.RunCodeRequest_Language{
		sandbox.Python: portalv1.RunCodeRequest_LANGUAGE_PYTHON,
		sandbox.Node:   portalv1.RunCodeRequest_LANGUAGE_NODE,
	}
	return start(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[portalv1.RunCodeResponse], error) {
		return c.runs.RunCode(ctx, &portalv1.RunCodeRequest{
			Language:    languages[code.Language],
			Code:        code.Text,
			Timeout:     duration(code.Timeout),
			Environment: environment(code.Environment),
			Env:         code.Env,
			Cwd:         code.Cwd,
			User:        code.User,
			Input:       code.Input,
			Grace:       duration(code.Grace),
		})
	}, func(response *portalv1.RunCodeResponse) *portalv1.ProcessEvent {
		if out := response.GetOutput(); out != nil {
			return outputEvent(out)
		}
		if response.GetResult().GetSuccess() {
			return exitEvent(0)
		}
		return exitEvent(1)
	}, run)
}

// RunCommand implements sandbox.Portal. If command.Timeout is 0 or negative, the run has no time limit.
func (c *Client) RunCommand(ctx context.Context, command sandbox.Command) (sandbox.Process, error) {
	if c.checkContract() != nil {
		return c.runCommandWithoutContract(ctx, command)
	}
	p, err := c.StartProcess(ctx, sandbox.ProcessRequest{Command: command, WithCall: true})
	if err != nil {
		return nil, err
	}
	return &runOfProcess{p, command.Timeout}, nil
}

// runCommandWithoutContract runs a command with the portal of an earlier version.
func (c *Client) runCommandWithoutContract(ctx context.Context, command sandbox.Command) (sandbox.Process, error) {
	if err := c.checkOptions(command.RunOptions); err != nil {
		return nil, err
	}
	return start(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[portalv1.RunCommandResponse], error) {
		return c.runs.RunCommand(ctx, &portalv1.RunCommandRequest{
			Command:     command.Program,
			Args:        command.Args,
			Timeout:     duration(command.Timeout),
			Environment: environment(command.Environment),
		})
	}, func(response *portalv1.RunCommandResponse) *portalv1.ProcessEvent {
		if out := response.GetOutput(); out != nil {
			return outputEvent(out)
		}
		return exitEvent(response.GetResult().GetExitCode())
	}, run)
}

// checkOptions returns an error if a request uses options that the portal does not support.
func (c *Client) checkOptions(o sandbox.RunOptions) error {
	if len(o.Env) > 0 || o.Cwd != "" || o.User != "" || len(o.Input) > 0 || o.Grace != 0 {
		return c.checkContract()
	}
	return nil
}

func outputEvent(out *portalv1.Output) *portalv1.ProcessEvent {
	return &portalv1.ProcessEvent{Event: &portalv1.ProcessEvent_Output{Output: out}}
}

func exitEvent(code int32) *portalv1.ProcessEvent {
	return &portalv1.ProcessEvent{Event: &portalv1.ProcessEvent_Exit{Exit: &portalv1.ProcessExit{ExitCode: code}}}
}

// runOfProcess is a run of a command, which the portal serves as a process.
type runOfProcess struct {
	sandbox.Process
	timeout time.Duration
}

// Next implements sandbox.Process.
func (r *runOfProcess) Next() (sandbox.Event, error) {
	event, err := r.Process.Next()
	if _, started := event.(sandbox.Started); started {
		event, err = r.Process.Next()
	}
	if exit, ended := event.(sandbox.Exit); ended && exit.TimedOut {
		return nil, classified{fmt.Sprintf("the run reached its time limit of %s and was interrupted", r.timeout), sandbox.ErrRunTimeout}
	}
	return event, err
}
