package portal

import (
	"context"
	"errors"
	"io"
	"math"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// maxTag limits the tag of a process, in bytes.
const maxTag = 1 << 10

// processService implements portalv1.ProcessServiceServer.
type processService struct {
	portalv1.UnimplementedProcessServiceServer
	programs *programs
}

// StartProcess implements portalv1.ProcessServiceServer.
func (s processService) StartProcess(req *portalv1.StartProcessRequest, stream grpc.ServerStreamingServer[portalv1.StartProcessResponse]) error {
	if len(req.GetTag()) > maxTag {
		return status.Errorf(codes.InvalidArgument, "the tag has %d bytes: use at most %d", len(req.GetTag()), maxTag)
	}
	if size := req.GetTerminal(); size != nil {
		if err := checkSize(size); err != nil {
			return err
		}
	}
	p, r, err := s.programs.start(stream.Context(), req)
	if err != nil {
		return err
	}
	send := func(e *portalv1.ProcessEvent) error {
		return stream.Send(&portalv1.StartProcessResponse{Event: e})
	}
	return p.sendEvents(stream.Context(), r, send)
}

// AttachProcess implements portalv1.ProcessServiceServer.
func (s processService) AttachProcess(req *portalv1.AttachProcessRequest, stream grpc.ServerStreamingServer[portalv1.AttachProcessResponse]) error {
	p, err := s.programs.find(req.GetProcess())
	if err != nil {
		return err
	}
	send := func(e *portalv1.ProcessEvent) error {
		return stream.Send(&portalv1.AttachProcessResponse{Event: e})
	}
	if !req.GetNoOutput() {
		return p.sendEvents(stream.Context(), p.attach(req.GetReplay(), req.GetNoFollow()), send)
	}
	s.programs.mu.Lock()
	printed := p.printed()
	s.programs.mu.Unlock()
	if err := p.sendStarted(printed, send); err != nil {
		return err
	}
	select {
	case <-p.done:
		return p.sendExit(send)
	case <-stream.Context().Done():
		return status.FromContextError(stream.Context().Err()).Err()
	}
}

// sendEvents sends ProcessStarted and the output that r gets. If that is everything that the program has printed until its end,
// it also sends ProcessExit.
func (p *program) sendEvents(ctx context.Context, r *reader, send func(*portalv1.ProcessEvent) error) error {
	complete, err := p.follow(ctx, r, func(skipped uint64) error {
		return p.sendStarted(skipped, send)
	}, func(stream portalv1.Output_Stream, data []byte) error {
		output := &portalv1.Output{Stream: stream, Data: data}
		return send(&portalv1.ProcessEvent{Event: &portalv1.ProcessEvent_Output{Output: output}})
	})
	if err != nil || !complete {
		return err
	}
	return p.sendExit(send)
}

func (p *program) sendStarted(skipped uint64, send func(*portalv1.ProcessEvent) error) error {
	started := &portalv1.ProcessStarted{Pid: p.info.GetPid(), SkippedBytes: skipped}
	return send(&portalv1.ProcessEvent{Event: &portalv1.ProcessEvent_Started{Started: started}})
}

// sendExit sends the exit of a program that has ended.
func (p *program) sendExit(send func(*portalv1.ProcessEvent) error) error {
	return send(&portalv1.ProcessEvent{Event: &portalv1.ProcessEvent_Exit{Exit: p.exit}})
}

// ListProcesses implements portalv1.ProcessServiceServer.
func (s processService) ListProcesses(_ *portalv1.ListProcessesRequest, stream grpc.ServerStreamingServer[portalv1.ListProcessesResponse]) error {
	for _, info := range s.programs.list() {
		if err := stream.Send(&portalv1.ListProcessesResponse{Process: info}); err != nil {
			return err
		}
	}
	return nil
}

// WriteInput implements portalv1.ProcessServiceServer.
func (s processService) WriteInput(stream grpc.ClientStreamingServer[portalv1.WriteInputRequest, portalv1.WriteInputResponse]) error {
	var p *program
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) && p != nil {
			return stream.SendAndClose(&portalv1.WriteInputResponse{})
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if p == nil {
			if p, err = s.programs.find(req.GetProcess()); err != nil {
				return err
			}
		}
		if !p.running() {
			return errProcessEnded
		}
		if err := p.input.write(stream.Context(), req.GetData(), req.GetClose()); err != nil {
			return err
		}
	}
}

// SignalProcess implements portalv1.ProcessServiceServer.
func (s processService) SignalProcess(_ context.Context, req *portalv1.SignalProcessRequest) (*portalv1.SignalProcessResponse, error) {
	p, err := s.programs.find(req.GetProcess())
	if err == nil {
		err = p.sendSignal(req.GetSignal(), req.GetAll())
	}
	if err != nil {
		return nil, err
	}
	return &portalv1.SignalProcessResponse{}, nil
}

// ResizeTerminal implements portalv1.ProcessServiceServer.
func (s processService) ResizeTerminal(_ context.Context, req *portalv1.ResizeTerminalRequest) (*portalv1.ResizeTerminalResponse, error) {
	p, err := s.programs.find(req.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := checkSize(req.GetSize()); err != nil {
		return nil, err
	}
	if !p.info.GetTerminal() {
		return nil, status.Error(codes.FailedPrecondition, "the process has no terminal")
	}
	if err := resize(p.input.file, req.GetSize()); err != nil {
		return nil, errProcessEnded // which has closed the terminal
	}
	return &portalv1.ResizeTerminalResponse{}, nil
}

// checkSize returns an error unless the kernel can represent size.
func checkSize(size *portalv1.TerminalSize) error {
	if size.GetColumns() > math.MaxUint16 || size.GetRows() > math.MaxUint16 {
		return status.Errorf(codes.InvalidArgument, "a terminal of %d columns and %d rows is too large: use at most %d",
			size.GetColumns(), size.GetRows(), math.MaxUint16)
	}
	return nil
}
