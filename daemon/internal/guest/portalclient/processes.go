package portalclient

import (
	"context"
	"io"

	"google.golang.org/grpc"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// StartProcess implements sandbox.Processes.
func (c *Client) StartProcess(ctx context.Context, req sandbox.ProcessRequest) (sandbox.Process, error) {
	if err := c.checkContract(processes); err != nil {
		return nil, err
	}
	return start(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[portalv1.StartProcessResponse], error) {
		return c.processes.StartProcess(ctx, &portalv1.StartProcessRequest{
			Argv:        append([]string{req.Program}, req.Args...),
			Environment: environment(req.Environment),
			Env:         req.Env,
			Cwd:         req.Cwd,
			User:        req.User,
			Terminal:    terminal(req.Terminal),
			Input:       req.Input,
			OpenInput:   req.OpenInput,
			Tag:         req.Tag,
			Timeout:     duration(req.Timeout),
			Grace:       duration(req.Grace),
			WithCall:    req.WithCall,
		})
	}, func(r *portalv1.StartProcessResponse) sandbox.Event { return processEvent(r.GetEvent()) }, started)
}

func terminal(size *sandbox.TerminalSize) *portalv1.TerminalSize {
	if size == nil {
		return nil
	}
	return &portalv1.TerminalSize{Columns: uint32(size.Columns), Rows: uint32(size.Rows)}
}

// AttachProcess implements sandbox.Processes.
func (c *Client) AttachProcess(ctx context.Context, id sandbox.ProcessID, o sandbox.AttachOptions) (sandbox.Process, error) {
	if err := c.checkContract(processes); err != nil {
		return nil, err
	}
	kind := attached
	if o.NoFollow {
		kind = snapshot
	}
	return start(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[portalv1.AttachProcessResponse], error) {
		return c.processes.AttachProcess(ctx, &portalv1.AttachProcessRequest{
			Process: selector(id), Replay: o.Replay, NoOutput: o.NoOutput, NoFollow: o.NoFollow,
		})
	}, func(r *portalv1.AttachProcessResponse) sandbox.Event { return processEvent(r.GetEvent()) }, kind)
}

func selector(id sandbox.ProcessID) *portalv1.ProcessSelector {
	return &portalv1.ProcessSelector{Pid: id.PID, Tag: id.Tag}
}

// ListProcesses implements sandbox.Processes.
func (c *Client) ListProcesses(ctx context.Context, each func(sandbox.ProcessInfo) error) error {
	stream, err := receive(ctx, c, c.processes.ListProcesses, &portalv1.ListProcessesRequest{})
	if err != nil {
		return err
	}
	defer stream.cancel()
	for {
		response, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return callError(stream.ctx, err)
		}
		p := response.GetProcess()
		info := sandbox.ProcessInfo{
			PID: p.GetPid(), Argv: p.GetArgv(), Env: p.GetEnv(), Cwd: p.GetCwd(), User: p.GetUser(), Tag: p.GetTag(), Terminal: p.GetTerminal(),
			WithCall: p.GetWithCall(), StartedAt: p.GetStartedAt().AsTime(), OutputBytes: p.GetOutputBytes(),
		}
		if e := p.GetExit(); e != nil {
			info.Exit = new(exit(e))
		}
		if err := each(info); err != nil {
			return err
		}
	}
}

// WriteInput implements sandbox.Processes.
func (c *Client) WriteInput(ctx context.Context, id sandbox.ProcessID, data io.Reader, end bool) error {
	_, err := send(ctx, c, c.processes.WriteInput, data,
		&portalv1.WriteInputRequest{Process: selector(id)}, "",
		func(piece []byte) *portalv1.WriteInputRequest { return &portalv1.WriteInputRequest{Data: piece} },
		func(stream grpc.ClientStreamingClient[portalv1.WriteInputRequest, portalv1.WriteInputResponse]) {
			if end {
				_ = stream.Send(&portalv1.WriteInputRequest{Close: true})
			}
		})
	return err
}

// SignalProcess implements sandbox.Processes.
func (c *Client) SignalProcess(ctx context.Context, id sandbox.ProcessID, signal int, all bool) error {
	_, err := call[portalv1.SignalProcessResponse](ctx, c, processes, portalv1.ProcessService_SignalProcess_FullMethodName,
		&portalv1.SignalProcessRequest{Process: selector(id), Signal: int32(signal), All: all})
	return err
}

// ResizeTerminal implements sandbox.Processes.
func (c *Client) ResizeTerminal(ctx context.Context, id sandbox.ProcessID, size sandbox.TerminalSize) error {
	_, err := call[portalv1.ResizeTerminalResponse](ctx, c, processes, portalv1.ProcessService_ResizeTerminal_FullMethodName,
		&portalv1.ResizeTerminalRequest{Process: selector(id), Size: terminal(&size)})
	return err
}
