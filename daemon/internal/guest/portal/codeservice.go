package portal

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// RunCode implements portalv1.PortalServiceServer.
func (s *server) RunCode(req *portalv1.RunCodeRequest, stream grpc.ServerStreamingServer[portalv1.RunCodeResponse]) error {
	r, err := s.repls.find(req)
	if err != nil {
		return err
	}
	defer s.repls.release(r)
	var interrupts <-chan struct{}
	if id := req.GetId(); id != "" {
		added, remove, ok := s.repls.namedRuns.Add(id)
		if !ok {
			return status.Error(codes.AlreadyExists, "another run has this id")
		}
		defer remove()
		interrupts = added
		_ = stream.SendHeader(nil) // an error means that the caller is gone, and the context ends the run
	}
	result, err := r.run(stream.Context(), interrupts, req, sink{
		output: func(from portalv1.Output_Stream, data []byte) error {
			return stream.Send(&portalv1.RunCodeResponse{Event: &portalv1.RunCodeResponse_Output{
				Output: &portalv1.Output{Stream: from, Data: data},
			}})
		},
		piece: func(kind byte, piece *portalv1.Piece) {
			response := &portalv1.RunCodeResponse{Event: &portalv1.RunCodeResponse_Display{Display: piece}}
			if kind == messageError {
				response.Event = &portalv1.RunCodeResponse_Error{Error: piece}
			}
			_ = stream.Send(response) // an error means that the caller is gone, and the context ends the run
		},
	})
	if err != nil {
		return err
	}
	return stream.Send(&portalv1.RunCodeResponse{Event: &portalv1.RunCodeResponse_Result{Result: result}})
}

// InterruptRun implements portalv1.PortalServiceServer.
func (s *server) InterruptRun(_ context.Context, req *portalv1.InterruptRunRequest) (*portalv1.InterruptRunResponse, error) {
	if !s.repls.namedRuns.Interrupt(req.GetId()) {
		return nil, status.Error(codes.NotFound, "there is no such run")
	}
	return &portalv1.InterruptRunResponse{}, nil
}

// Warm implements portalv1.PortalServiceServer.
func (s *server) Warm(ctx context.Context, req *portalv1.WarmRequest) (*portalv1.WarmResponse, error) {
	warm, err := s.repls.warm(ctx, req.GetLanguages())
	if err != nil {
		return nil, err
	}
	return &portalv1.WarmResponse{Languages: warm}, nil
}

// CreateContext implements portalv1.PortalServiceServer.
func (s *server) CreateContext(ctx context.Context, req *portalv1.CreateContextRequest) (*portalv1.CreateContextResponse, error) {
	r, err := s.repls.create(ctx, req)
	if err != nil {
		return nil, err
	}
	return &portalv1.CreateContextResponse{Context: r.info()}, nil
}

// ListContexts implements portalv1.PortalServiceServer.
func (s *server) ListContexts(context.Context, *portalv1.ListContextsRequest) (*portalv1.ListContextsResponse, error) {
	return &portalv1.ListContextsResponse{Contexts: s.repls.list()}, nil
}

// RestartContext implements portalv1.PortalServiceServer.
func (s *server) RestartContext(ctx context.Context, req *portalv1.RestartContextRequest) (*portalv1.RestartContextResponse, error) {
	r, err := s.repls.restart(ctx, req.GetName(), req.GetEnvironment())
	if err != nil {
		return nil, err
	}
	return &portalv1.RestartContextResponse{Context: r.info()}, nil
}

// RemoveContext implements portalv1.PortalServiceServer.
func (s *server) RemoveContext(_ context.Context, req *portalv1.RemoveContextRequest) (*portalv1.RemoveContextResponse, error) {
	if err := s.repls.remove(req.GetName()); err != nil {
		return nil, err
	}
	return &portalv1.RemoveContextResponse{}, nil
}
