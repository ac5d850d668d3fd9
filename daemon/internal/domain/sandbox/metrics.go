package sandbox

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

// Metrics is the resource usage of a sandbox. MemoryMiB and DiskBytes are nil if it does not run or could not be measured.
type Metrics struct {
	Name    Name
	Running bool
	// CPUPercent is in percent of one processor: two busy processors are 200.
	CPUPercent float64
	MemoryMiB  *int64
	DiskBytes  *int64
}

// Metrics returns the metrics of the sandboxes that match. An empty namespace matches every tenant namespace, and an empty
// name matches every sandbox. If name is set and no sandbox matches, the error is errdefs.ErrNotFound.
func (m *Manager) Metrics(ctx context.Context, namespace, name string) ([]Metrics, error) {
	if err := m.checkOpen(); err != nil {
		return nil, err
	}
	recs := m.List(namespace)
	if name != "" {
		recs = slices.DeleteFunc(recs, func(r Record) bool { return r.Name.Name != name })
		if len(recs) == 0 {
			if namespace == "" {
				return nil, fmt.Errorf("sandbox %s does not exist in any namespace: %w", name, errdefs.ErrNotFound)
			}
			return nil, notFound(Name{namespace, name})
		}
	}
	all := make([]Metrics, len(recs))
	var g errgroup.Group
	g.SetLimit(parallelism)
	for i, rec := range recs {
		all[i] = Metrics{Name: rec.Name, Running: rec.State == Running}
		if all[i].Running {
			g.Go(func() error {
				m.measure(ctx, rec, &all[i])
				return nil
			})
		}
	}
	g.Wait()
	return all, nil
}

func (m *Manager) measure(ctx context.Context, rec Record, out *Metrics) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	u, err := m.Runtime.Usage(ctx, rec.ID)
	if err != nil {
		// The microVM may have just ended, which its watcher records. Leave the usage unknown.
		m.Log.Warn("could not measure the sandbox", "sandbox", rec.Name.Name, "namespace", rec.Name.Namespace, "err", err)
		return
	}
	m.mu.Lock()
	e := m.entries[rec.Name]
	m.mu.Unlock()
	if e != nil {
		out.CPUPercent = e.cpuPercent(rec, u.CPUTime, time.Now())
	}
	mem, disk := int64(u.MemoryBytes>>20), int64(u.DiskBytes)
	out.MemoryMiB, out.DiskBytes = &mem, &disk
}
