package agent

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

// maxRead is the maximum number of bytes that one ReadStdout or ReadStderr returns.
const maxRead = 1 << 20

// WriteStdin writes to the standard input of a process. It waits until the process has read the data or the pipe has
// room for it. A request without data closes the input.
func (a *agent) WriteStdin(ctx context.Context, req *pb.WriteStreamRequest) (*pb.WriteStreamResponse, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	if len(req.Data) == 0 {
		p.CloseStdin()
		return &pb.WriteStreamResponse{}, nil
	}
	n, err := p.WriteStdin(ctx, req.Data)
	if err != nil {
		return nil, err
	}
	return &pb.WriteStreamResponse{Len: uint32(n)}, nil
}

// CloseStdin closes the standard input of a process.
func (a *agent) CloseStdin(_ context.Context, req *pb.CloseStdinRequest) (*emptypb.Empty, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	p.CloseStdin()
	return &emptypb.Empty{}, nil
}

// ReadStdout waits for output of a process and returns it. At the end of the output, it returns an error with the
// code OutOfRange.
func (a *agent) ReadStdout(ctx context.Context, req *pb.ReadStreamRequest) (*pb.ReadStreamResponse, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	return readOutput(ctx, p.ReadStdout, req.Len)
}

// ReadStderr is like ReadStdout but for standard error. A process with a terminal has no standard error, so ReadStderr
// returns OutOfRange for it.
func (a *agent) ReadStderr(ctx context.Context, req *pb.ReadStreamRequest) (*pb.ReadStreamResponse, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	return readOutput(ctx, p.ReadStderr, req.Len)
}

// TtyWinResize sets the size of a process's terminal.
func (a *agent) TtyWinResize(_ context.Context, req *pb.TtyWinResizeRequest) (*emptypb.Empty, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	return emptyResponse(p.Resize(req.Row, req.Column))
}

// errEndOfStream is the error with which the shim recognizes the end of a stream.
var errEndOfStream = fmt.Errorf("end of stream: %w", errdefs.ErrOutOfRange)

func readOutput(ctx context.Context, read func(context.Context, int) ([]byte, error), limit uint32) (*pb.ReadStreamResponse, error) {
	if limit == 0 {
		return nil, refusal.Invalid("read of 0 bytes: want at least 1")
	}
	data, err := read(ctx, int(min(limit, maxRead)))
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, errEndOfStream
	}
	return &pb.ReadStreamResponse{Data: data}, nil
}
