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

// ImportImage implements AdminServiceServer.
func (s *Server) ImportImage(ctx context.Context, req *adminv1.ImportImageRequest) (*adminv1.ImportImageResponse, error) {
	var images []sandbox.Image
	err := s.recordAttempt(ctx, audit.Event{Action: audit.ImageImport, Target: req.GetPath()}, audit.ImportFailed, func() (err error) {
		images, err = s.Images.Import(ctx, req.GetPath())
		return err
	})
	if err != nil {
		return nil, err
	}
	return &adminv1.ImportImageResponse{Images: toProtos(images, imageProto)}, nil
}

// RemoveImage implements AdminServiceServer.
func (s *Server) RemoveImage(ctx context.Context, req *adminv1.RemoveImageRequest) (*adminv1.RemoveImageResponse, error) {
	err := s.recordAttempt(ctx, audit.Event{Action: audit.ImageRemove, Target: req.GetName()}, audit.RemoveFailed, func() error {
		return s.Images.Remove(ctx, req.GetName(), s.Sandboxes.List(""))
	})
	if err != nil {
		return nil, err
	}
	return new(adminv1.RemoveImageResponse), nil
}

// recordAttempt records e before it calls attempt, so that no image changes without an entry. If attempt fails, it records
// a second entry with the action failed.
func (s *Server) recordAttempt(ctx context.Context, e audit.Event, failed string, attempt func() error) error {
	if err := s.record(ctx, e); err != nil {
		return err
	}
	err := attempt()
	if err == nil {
		return nil
	}
	e.Action, e.Detail = failed, map[string]string{"error": bounded.Short(rpcerr.Message(err))}
	if recordErr := s.record(ctx, e); recordErr != nil {
		s.Log.Error("could not record a failure in the audit log", "action", e.Action, "target", e.Target, "err", recordErr)
	}
	return err
}

// ListImages implements AdminServiceServer.
func (s *Server) ListImages(ctx context.Context, _ *adminv1.ListImagesRequest) (*adminv1.ListImagesResponse, error) {
	images, err := s.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	return &adminv1.ListImagesResponse{Images: toProtos(images, imageProto)}, nil
}
