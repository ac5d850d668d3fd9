package kata

import (
	"context"
	"fmt"
	"time"

	v1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/typeurl/v2"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// Usage satisfies sandbox.Runtime. Processor time and memory are what the guest's kernel counts for
// the sandbox; disk is what it wrote over its image.
func (r *Runtime) Usage(ctx context.Context, id string) (sandbox.Usage, error) {
	var u sandbox.Usage
	ctx = ctrd.InNamespace(ctx)
	container, err := r.Client.LoadContainer(ctx, id)
	if err != nil {
		return u, fmt.Errorf("find the container: %w", err)
	}
	task, err := container.Task(ctx, nil)
	if err != nil {
		return u, fmt.Errorf("find the task: %w", err)
	}
	metric, err := task.Metrics(ctx)
	if err != nil {
		return u, fmt.Errorf("ask for metrics: %w", err)
	}
	stats, err := typeurl.UnmarshalAny(metric.Data)
	if err != nil {
		return u, fmt.Errorf("read metrics: %w", err)
	}
	// Kata answers in the form of the host's cgroup version, whatever the guest has.
	switch s := stats.(type) {
	case *v1.Metrics:
		u.CPUTime = time.Duration(s.GetCPU().GetUsage().GetTotal())
		u.MemoryBytes = s.GetMemory().GetUsage().GetUsage()
	case *v2.Metrics:
		u.CPUTime = time.Duration(s.GetCPU().GetUsageUsec()) * time.Microsecond
		u.MemoryBytes = s.GetMemory().GetUsage()
	default:
		return u, fmt.Errorf("read metrics: unknown form %T", stats)
	}
	disk, err := r.Client.SnapshotService(ctrd.Snapshotter).Usage(ctx, id)
	if err != nil {
		return u, fmt.Errorf("measure the disk: %w", err)
	}
	u.DiskBytes = uint64(disk.Size)
	return u, nil
}
