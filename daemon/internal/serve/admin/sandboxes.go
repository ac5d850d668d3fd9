package admin

import (
	"context"
	"time"

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

// progressInterval is the shortest time between two reports of the progress of an import.
const progressInterval = 200 * time.Millisecond

// ImportImage implements AdminServiceServer.
func (s *Server) ImportImage(req *adminv1.ImportImageRequest, stream adminv1.AdminService_ImportImageServer) error {
	ctx := stream.Context()
	var images []sandbox.Image
	err := s.recordAttempt(ctx, audit.Event{Action: audit.ImageImport, Target: req.GetPath()}, audit.ImportFailed, func() (err error) {
		images, err = s.importImage(ctx, req.GetPath(), func(p sandbox.ImportProgress) {
			// If the client has gone, ctx ends, and with it the import.
			_ = stream.Send(&adminv1.ImportImageResponse{Progress: progressProto(p)})
		})
		return err
	})
	if err != nil {
		return err
	}
	return stream.Send(&adminv1.ImportImageResponse{Images: toProtos(images, imageProto)})
}

// importImage imports an archive, and calls report with the latest progress from time to time. The import does not wait
// for report, because a client may be slow.
func (s *Server) importImage(ctx context.Context, path string, report func(sandbox.ImportProgress)) (images []sandbox.Image, err error) {
	latest, done := make(chan sandbox.ImportProgress, 1), make(chan struct{})
	go func() {
		defer close(done)
		images, err = s.Images.Import(ctx, path, func(p sandbox.ImportProgress) {
			select {
			case <-latest:
			default:
			}
			select {
			case latest <- p:
			default: // another call was faster
			}
		})
	}()
	for {
		select {
		case p := <-latest:
			report(p)
		case <-done:
			return images, err
		}
		select {
		case <-time.After(progressInterval):
		case <-done:
			return images, err
		}
	}
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
