package kata

import (
	"context"
	"errors"
	"fmt"
	"time"

	v1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/typeurl/v2"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// Usage implements sandbox.Runtime. The guest's kernel measures the sandbox's CPU time and memory. The disk usage is what
// the sandbox's disk takes on the host. That of a sandbox without disks is measured by the snapshotter and may be older
// than the rest; see diskMeter. A failure to measure it is logged.
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
		return u, fmt.Errorf("get metrics: %w", err)
	}
	stats, err := typeurl.UnmarshalAny(metric.Data)
	if err != nil {
		return u, fmt.Errorf("decode metrics: %w", err)
	}
	// The type depends on the host's cgroup version, not on the guest's.
	switch s := stats.(type) {
	case *v1.Metrics:
		u.CPUTime = time.Duration(s.GetCPU().GetUsage().GetTotal())
		u.MemoryBytes = s.GetMemory().GetUsage().GetUsage()
	case *v2.Metrics:
		u.CPUTime = time.Duration(s.GetCPU().GetUsageUsec()) * time.Microsecond
		u.MemoryBytes = s.GetMemory().GetUsage()
	default:
		return u, fmt.Errorf("decode metrics: unknown type %T", stats)
	}
	measure := r.disk.usage
	if _, _, ok := r.Disks.Find(id); ok {
		measure = func(_ context.Context, id string) (uint64, error) { return r.Disks.Usage(id) }
	}
	if disk, err := measure(ctx, id); err == nil {
		u.DiskBytes = &disk
	} else if !errors.Is(err, errNotMeasured) {
		r.Log.Warn("could not measure the disk usage of the sandbox", "sandbox", id, "err", err)
	}
	return u, nil
}

// measureDisk returns the size of the writable layer of sandbox id, in bytes.
func (r *Runtime) measureDisk(ctx context.Context, id string) (uint64, error) {
	usage, err := r.Client.SnapshotService(ctrd.Snapshotter).Usage(ctx, id)
	return uint64(usage.Size), err
}
