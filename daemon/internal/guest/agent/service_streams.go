package agent

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

// maxRead bounds the answer to one ReadStdout or ReadStderr.
const maxRead = 1 << 20

// WriteStdin writes to a process, and waits while it does not read. Nothing to write means the end.
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

// CloseStdin ends a process's input.
func (a *agent) CloseStdin(_ context.Context, req *pb.CloseStdinRequest) (*emptypb.Empty, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	p.CloseStdin()
	return &emptypb.Empty{}, nil
}

// ReadStdout waits for output. The end is an error, of code OutOfRange.
func (a *agent) ReadStdout(ctx context.Context, req *pb.ReadStreamRequest) (*pb.ReadStreamResponse, error) {
	p, err := a.process(req.ContainerId, req.ExecId)
	if err != nil {
		return nil, err
	}
	return readOutput(ctx, p.ReadStdout, req.Len)
}

// ReadStderr is ReadStdout for the other stream. A process with a terminal has none.
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
	return done(p.Resize(req.Row, req.Column))
}

// errEndOfStream is how the shim's reader learns of the end.
var errEndOfStream = fmt.Errorf("end of stream: %w", errdefs.ErrOutOfRange)

func readOutput(ctx context.Context, read func(context.Context, int) ([]byte, error), limit uint32) (*pb.ReadStreamResponse, error) {
	if limit == 0 {
		return nil, refusal.Invalid("read of 0 bytes")
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
