package sandbox

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

const (
	// measureTimeout limits the measurement of one sandbox. It allows for guests that are emulated on a busy host.
	measureTimeout = 3 * time.Second
	// allMeasuredTimeout limits a call that measures many sandboxes.
	allMeasuredTimeout = 10 * time.Second
	// measured is how many sandboxes one call measures at the same time. A measurement waits for its guest most of the time.
	measured = 128
)

// Metrics is the resource usage of a sandbox. CPUPercent, MemoryMiB and DiskBytes are nil if it does not run or could not be
// measured.
type Metrics struct {
	Name  Name
	State State
	// Reason says why the sandbox failed, like that of a Record.
	Reason string
	// CPUPercent is in percent of one processor: two busy processors are 200.
	CPUPercent *float64
	MemoryMiB  *int64
	DiskBytes  *int64
}

// Metrics returns the metrics of the sandboxes in several tenant namespaces, or in all namespaces if namespaces is empty. If
// name is set, it returns only sandboxes of that name, and errdefs.ErrNotFound if there is none.
func (m *Manager) Metrics(ctx context.Context, namespaces []string, name string) ([]Metrics, error) {
	recs, err := m.ListIn(namespaces)
	if err != nil {
		return nil, err
	}
	if name != "" {
		recs = slices.DeleteFunc(recs, func(r Record) bool { return r.Name.Name != name })
		if len(recs) == 0 {
			return nil, notFoundIn(namespaces, name)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, allMeasuredTimeout)
	defer cancel()
	all := make([]Metrics, len(recs))
	var g errgroup.Group
	g.SetLimit(measured)
	for i, rec := range recs {
		all[i] = Metrics{Name: rec.Name, State: rec.State, Reason: rec.Reason}
		if rec.State == Running {
			g.Go(func() error {
				m.measure(ctx, rec, &all[i])
				return nil
			})
		}
	}
	g.Wait()
	return all, nil
}

// notFoundIn returns the error for a name that no sandbox in the namespaces has; none stands for all namespaces.
func notFoundIn(namespaces []string, name string) error {
	switch len(namespaces) {
	case 0:
		return fmt.Errorf("sandbox %s does not exist in any namespace: %w", name, errdefs.ErrNotFound)
	case 1:
		return notFound(Name{namespaces[0], name})
	default:
		return fmt.Errorf("sandbox %s does not exist in any of the namespaces %s: %w", name, strings.Join(namespaces, ", "), errdefs.ErrNotFound)
	}
}

func (m *Manager) measure(ctx context.Context, rec Record, out *Metrics) {
	ctx, cancel := context.WithTimeout(ctx, measureTimeout)
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
		percent := e.cpuPercent(rec, u.CPUTime, time.Now())
		out.CPUPercent = &percent
	}
	out.MemoryMiB = new(int64(u.MemoryBytes >> 20))
	if u.DiskBytes != nil {
		out.DiskBytes = new(int64(*u.DiskBytes))
	}
}
