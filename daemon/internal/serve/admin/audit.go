package admin

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/audit"
	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
)

// TailAudit implements AdminServiceServer.
func (s *Server) TailAudit(req *adminv1.TailAuditRequest, stream adminv1.AdminService_TailAuditServer) error {
	if req.GetLast() < 0 {
		return fmt.Errorf("the number of entries to print is %d, but must not be negative: %w", req.GetLast(), errdefs.ErrInvalidArgument)
	}
	return s.Audit.TailAudit(stream.Context(), int(req.GetLast()), req.GetFollow(), func(line []byte) error {
		return stream.Send(&adminv1.TailAuditResponse{Line: string(line)})
	})
}

// VerifyAudit implements AdminServiceServer. If the log is damaged, it returns the problem in the response, not an error.
func (s *Server) VerifyAudit(ctx context.Context, _ *adminv1.VerifyAuditRequest) (*adminv1.VerifyAuditResponse, error) {
	head, err := s.Audit.VerifyAudit(ctx)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	resp := &adminv1.VerifyAuditResponse{
		Entries: head.Seq, Hash: head.Hash, Path: s.Audit.AuditPath(), Segments: toProtos(s.Audit.AuditSegments(), segmentProto),
	}
	if err != nil {
		resp.Problem = rpcerr.Message(err)
		s.Log.Error("audit log is damaged", "entries", head.Seq, "err", err)
	}
	return resp, nil
}

// SealAudit implements AdminServiceServer. If there is nothing to seal, the response has no segment.
func (s *Server) SealAudit(ctx context.Context, _ *adminv1.SealAuditRequest) (*adminv1.SealAuditResponse, error) {
	segment, err := s.Audit.SealAudit(ctx, audit.ActorUID(s.uid(ctx)))
	if errdefs.IsFailedPrecondition(err) {
		return new(adminv1.SealAuditResponse), nil
	}
	if err != nil {
		return nil, err
	}
	return &adminv1.SealAuditResponse{Segment: segmentProto(segment)}, nil
}

// AcknowledgeAudit implements AdminServiceServer.
func (s *Server) AcknowledgeAudit(ctx context.Context, _ *adminv1.AcknowledgeAuditRequest) (*adminv1.AcknowledgeAuditResponse, error) {
	problems, err := s.Audit.AcknowledgeAudit(ctx, s.uid(ctx))
	if err != nil {
		return nil, err
	}
	return &adminv1.AcknowledgeAuditResponse{Problems: problems}, nil
}

func segmentProto(s audit.Segment) *adminv1.AuditSegment {
	return &adminv1.AuditSegment{Path: s.Path, First: s.First, Last: s.Last.Seq, Hash: s.Last.Hash, Absent: s.Absent}
}
