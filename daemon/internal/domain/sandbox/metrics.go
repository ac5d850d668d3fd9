package sandbox

import (
	"context"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
)

// Metrics is what is known of a sandbox at one moment. The usages are nil when it does not run.
type Metrics struct {
	Name    Name
	Running bool
	// CPUPercent is of one processor: two busy ones are 200.
	CPUPercent float64
	MemoryMiB  *int64
	DiskBytes  *int64
}

// Metrics measures one sandbox, or all of a tenant namespace when name is empty, or all of the
// server when both are. errdefs.ErrNotFound when the named one does not exist.
func (m *Manager) Metrics(ctx context.Context, namespace, name string) ([]Metrics, error) {
	if err := m.accepting(); err != nil {
		return nil, err
	}
	recs := m.List(namespace)
	if name != "" {
		recs = slices.DeleteFunc(recs, func(r Record) bool { return r.Name.Name != name })
		if len(recs) == 0 {
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
		// It may have ended this moment; its watcher records that. The usages stay unknown.
		m.Log.Warn("measure sandbox", "sandbox", rec.Name.Name, "namespace", rec.Name.Namespace, "err", err)
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
