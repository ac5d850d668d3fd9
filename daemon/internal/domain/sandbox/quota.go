package sandbox

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// Quota limits the resources that all sandboxes of a tenant namespace may use together. A field that is 0 means no limit.
// Failed sandboxes do not count.
type Quota struct {
	Sandboxes, CPUs, MemoryMiB int
	// Runs limits the runs of code and commands in progress, including those that wait in a queue.
	Runs int
}

// reserve counts cfg against the quota of e's tenant namespace while a start is in progress. It returns
// errdefs.ErrResourceExhausted if that exceeds the quota. The caller must hold e's lock, and end the reservation with
// e.setReserved(nil).
func (m *Manager) reserve(e *entry, cfg Config) error {
	namespace := e.name.Namespace
	q := m.Quota(namespace)
	m.mu.Lock()
	defer m.mu.Unlock()
	used := Quota{Sandboxes: 1, CPUs: cfg.CPUs, MemoryMiB: cfg.MemoryMiB}
	for name, other := range m.entries {
		if name.Namespace != namespace || other == e {
			continue
		}
		if c, counts := other.quotaUse(); counts {
			used.Sandboxes++
			used.CPUs += c.CPUs
			used.MemoryMiB += c.MemoryMiB
		}
	}
	for _, l := range []struct {
		one, many   string
		used, limit int
	}{
		{"sandbox", "sandboxes", used.Sandboxes, q.Sandboxes},
		{"virtual processor", "virtual processors", used.CPUs, q.CPUs},
		{"MiB of memory", "MiB of memory", used.MemoryMiB, q.MemoryMiB},
	} {
		if l.limit > 0 && l.used > l.limit {
			return fmt.Errorf("namespace %s is limited to %s; this start would need %d. Stop one of its sandboxes first, "+
				"or ask the server's administrator for more: %w", namespace, count(l.limit, l.one, l.many), l.used, errdefs.ErrResourceExhausted)
		}
	}
	e.setReserved(&cfg)
	return nil
}

// count returns n and its unit, such as "1 sandbox" or "2 sandboxes".
func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// beginRun counts a run against the quota of a tenant namespace until end is called. It returns
// errdefs.ErrResourceExhausted if the quota is used up.
func (m *Manager) beginRun(namespace string) (end func(), err error) {
	limit := m.Quota(namespace).Runs
	m.mu.Lock()
	defer m.mu.Unlock()
	if limit > 0 && m.runs[namespace] >= limit {
		return nil, fmt.Errorf("namespace %s may have %s in progress at a time; wait for one to end: %w",
			namespace, count(limit, "run", "runs"), errdefs.ErrResourceExhausted)
	}
	m.runs[namespace]++
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.runs[namespace]--; m.runs[namespace] == 0 {
			delete(m.runs, namespace)
		}
	}, nil
}
