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
	return &adminv1.Pool{
		Template: templateProto(t.Template), IsDefault: t.Default, Min: int32(t.Min), Max: int32(t.Max), Target: int32(t.Target),
		Ready: int32(t.Ready), Filling: t.Filling, Hits: t.Hits, Misses: t.Misses, Failures: t.Failures, LastError: t.LastError,
		Waits: t.Waits, RetryAt: timeProto(t.RetryAt), Entries: toProtos(t.Entries, entryProto),
	}
}

func entryProto(e sandbox.EntryStatus) *adminv1.PoolEntry {
	return &adminv1.PoolEntry{Id: e.ID, CreatedAt: timestamppb.New(e.CreatedAt), CpuSeconds: e.CPU.Seconds(), MemoryBytes: e.MemoryBytes}
}

// PoolSummary returns the part of a status of the server that describes the pool.
func PoolSummary(status sandbox.PoolStatus) *adminv1.PoolSummary {
	s := &adminv1.PoolSummary{Off: status.Off}
	var oldest time.Time
	for _, t := range status.Templates {
		s.Ready += int32(t.Ready)
		s.Target += int32(t.Target)
		s.Hits += t.Hits
		s.Misses += t.Misses
		for _, e := range t.Entries {
			if oldest.IsZero() || e.CreatedAt.Before(oldest) {
				oldest = e.CreatedAt
			}
			s.CpuSeconds += e.CPU.Seconds()
			s.MemoryBytes += e.MemoryBytes
		}
	}
	s.Oldest = timeProto(oldest)
	return s
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
