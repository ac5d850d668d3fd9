package admin

import (
	"context"

	"github.com/msbd/msbd/api/audit"
	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/domain/name"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// ListSandboxes implements AdminServiceServer.
func (s *Server) ListSandboxes(_ context.Context, req *adminv1.ListSandboxesRequest) (*adminv1.ListSandboxesResponse, error) {
	if ns := req.GetNamespace(); ns != "" {
		if err := name.Validate("namespace", ns); err != nil {
			return nil, err
		}
	}
	return &adminv1.ListSandboxesResponse{Sandboxes: toProtos(s.Sandboxes.List(req.GetNamespace()), sandboxProto)}, nil
}

// StopSandbox implements AdminServiceServer.
func (s *Server) StopSandbox(ctx context.Context, req *adminv1.StopSandboxRequest) (*adminv1.StopSandboxResponse, error) {
	name := sandbox.Name{Namespace: req.GetNamespace(), Name: req.GetName()}
	if name.Namespace == "" {
		name.Namespace = sandbox.DefaultNamespace
	}
	if err := name.Validate(); err != nil {
		return nil, err
	}
	err := s.recordStop(ctx, audit.Event{Action: audit.SandboxStop, Target: name.String()}, func() error {
		return s.Sandboxes.Stop(ctx, name)
	})
	if err != nil {
		return nil, err
	}
	return new(adminv1.StopSandboxResponse), nil
}

// ImportImage implements AdminServiceServer. It records the import before it begins, so that no image is added without an
// entry. If the import then fails, a second entry says so.
func (s *Server) ImportImage(ctx context.Context, req *adminv1.ImportImageRequest) (*adminv1.ImportImageResponse, error) {
	if err := s.record(ctx, audit.Event{Action: audit.ImageImport, Target: req.GetPath()}); err != nil {
		return nil, err
	}
	images, err := s.Images.Import(ctx, req.GetPath())
	if err != nil {
		failed := audit.Event{Action: audit.ImportFailed, Target: req.GetPath(), Detail: map[string]string{"error": bounded.Short(rpcerr.Message(err))}}
		if recordErr := s.record(ctx, failed); recordErr != nil {
			s.Log.Error("could not record that an import failed", "path", req.GetPath(), "err", recordErr)
		}
		return nil, err
	}
	return &adminv1.ImportImageResponse{Images: toProtos(images, imageProto)}, nil
}

// ListImages implements AdminServiceServer.
func (s *Server) ListImages(ctx context.Context, _ *adminv1.ListImagesRequest) (*adminv1.ListImagesResponse, error) {
	images, err := s.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	return &adminv1.ListImagesResponse{Images: toProtos(images, imageProto)}, nil
}
