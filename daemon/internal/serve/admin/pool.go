package admin

import (
	"context"
	"strconv"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/msbd/msbd/api/audit"
	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// PoolStatus implements AdminServiceServer.
func (s *Server) PoolStatus(context.Context, *adminv1.PoolStatusRequest) (*adminv1.PoolStatusResponse, error) {
	status := s.Sandboxes.PoolStatus()
	return &adminv1.PoolStatusResponse{
		Off: status.Off, MemoryMib: int64(status.MemoryMiB), MaxMemoryMib: int64(status.MaxMemoryMiB), Pools: toProtos(status.Templates, poolProto),
	}, nil
}

func poolProto(t sandbox.TemplateStatus) *adminv1.Pool {
	stamp := func(at time.Time) *timestamppb.Timestamp {
		if at.IsZero() {
			return nil
		}
		return timestamppb.New(at)
	}
	return &adminv1.Pool{
		Template: templateProto(t.Template), IsDefault: t.Default, Min: int32(t.Min), Max: int32(t.Max), Target: int32(t.Target),
		Ready: int32(t.Ready), Filling: t.Filling, Hits: t.Hits, Misses: t.Misses, Failures: t.Failures, LastError: t.LastError,
		Waits: t.Waits, RetryAt: stamp(t.RetryAt), Oldest: stamp(t.Oldest), CpuSeconds: t.CPU.Seconds(), MemoryBytes: t.MemoryBytes,
	}
}

func templateProto(t sandbox.Template) *adminv1.PoolTemplate {
	return &adminv1.PoolTemplate{Image: t.Image, Cpus: int32(t.CPUs), MemoryMib: int32(t.MemoryMiB), DiskMib: int32(t.DiskMiB)}
}

// SetPool implements AdminServiceServer.
func (s *Server) SetPool(ctx context.Context, req *adminv1.SetPoolRequest) (*adminv1.SetPoolResponse, error) {
	t := req.GetTemplate()
	e := audit.Event{Action: audit.PoolSet, Target: t.GetImage(), Detail: map[string]string{
		"min": strconv.Itoa(int(req.GetMin())), "max": strconv.Itoa(int(req.GetMax())), "cpus": strconv.Itoa(int(t.GetCpus())),
		"memory_mib": strconv.Itoa(int(t.GetMemoryMib())), "disk_mib": strconv.Itoa(int(t.GetDiskMib())),
	}}
	if err := s.record(ctx, e); err != nil {
		return nil, err
	}
	size, err := s.Sandboxes.SetPool(ctx, sandbox.Request{
		Image: t.GetImage(), CPUs: int(t.GetCpus()), MemoryMiB: int(t.GetMemoryMib()), DiskMiB: int(t.GetDiskMib()),
	}, int(req.GetMin()), int(req.GetMax()))
	if err != nil {
		return nil, err
	}
	return &adminv1.SetPoolResponse{Template: templateProto(size.Template)}, nil
}
