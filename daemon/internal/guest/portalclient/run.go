package portalclient

import (
	"context"

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
		switch event := response.GetEvent().(type) {
		case *portalv1.RunCodeResponse_Output:
			return outputEvent(event.Output)
		case *portalv1.RunCodeResponse_Result:
			if event.Result.GetSuccess() {
				return exitEvent(0)
			}
			return exitEvent(1)
		}
		return nil
	}, run)
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
	}, func(response *portalv1.RunCommandResponse) *portalv1.ProcessEvent {
		switch event := response.GetEvent().(type) {
		case *portalv1.RunCommandResponse_Output:
			return outputEvent(event.Output)
		case *portalv1.RunCommandResponse_Result:
			return exitEvent(event.Result.GetExitCode())
		}
		return nil
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
