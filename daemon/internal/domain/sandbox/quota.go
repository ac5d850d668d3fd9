package sandbox

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// Quota limits the resources that the sandboxes of a tenant namespace, or of the server, may use together. A field that is 0
// means no limit. Failed sandboxes do not count.
type Quota struct {
	Sandboxes, CPUs, MemoryMiB int
	// DiskMiB limits the sum of the sizes of the writable disks. A disk whose size is not limited counts as 0.
	DiskMiB int
	// Runs limits the runs of code and commands in progress, including those that wait in a queue.
	Runs int
}

// reserve counts cfg against the quota of e's tenant namespace and against the limits of the server, while a start is in
// progress. It returns a Refusal if that exceeds one of them. The caller must hold e's lock, and end the
// reservation with e.setReserved(nil).
func (m *Manager) reserve(e *entry, cfg Config) error {
	namespace := e.name.Namespace
	q := m.Quota(namespace)
	m.mu.Lock()
	defer m.mu.Unlock()
	one := quotaOf(cfg)
	used := m.use(func(other *entry) bool { return other != e && other.name.Namespace == namespace }).plus(one)
	if l := used.exceeds(q); l != nil {
		return &Refusal{text: fmt.Sprintf("namespace %s is limited to %s; this start would need %d. Stop one of its sandboxes first, "+
			"or ask the server's administrator for more", namespace, count(l.limit, l.one, l.many), l.used)}
	}
	// Do not say what is in use: it belongs to other tenants.
	if l := m.use(func(other *entry) bool { return other != e }).plus(one).exceeds(m.Total); l != nil {
		return &Refusal{fmt.Sprintf("the server is limited to %s for all sandboxes together, and not enough is left for this one. Stop a sandbox "+
			"that is no longer needed, ask for less memory, or try again later; the server's administrator can raise the limit",
			count(l.limit, l.one, l.many)), retryStart}
	}
	e.setReserved(&cfg)
	return nil
}

// InUse returns what the sandboxes of all tenant namespaces use, as Options.Total limits it.
func (m *Manager) InUse() Quota {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.use(func(*entry) bool { return true })
}

// use returns what the sandboxes of the matching entries use. The caller must hold m.mu.
func (m *Manager) use(matches func(*entry) bool) (used Quota) {
	for _, e := range m.entries {
		if c, counts := e.quotaUse(); counts && matches(e) {
			used = used.plus(quotaOf(c))
		}
	}
	return used
}

// quotaOf returns what one sandbox with this configuration uses.
func quotaOf(c Config) Quota {
	return Quota{Sandboxes: 1, CPUs: c.CPUs, MemoryMiB: c.MemoryMiB, DiskMiB: c.DiskMiB}
}

func (q Quota) plus(other Quota) Quota {
	return Quota{
		Sandboxes: q.Sandboxes + other.Sandboxes, CPUs: q.CPUs + other.CPUs,
		MemoryMiB: q.MemoryMiB + other.MemoryMiB, DiskMiB: q.DiskMiB + other.DiskMiB,
	}
}

// limit is a limit of a quota, with its unit.
type limit struct {
	one, many   string
	used, limit int
}

// exceeds returns the first limit of a quota that q exceeds, or nil.
func (q Quota) exceeds(limits Quota) *limit {
	for _, l := range []limit{
		{"sandbox", "sandboxes", q.Sandboxes, limits.Sandboxes},
		{"virtual processor", "virtual processors", q.CPUs, limits.CPUs},
		{"MiB of memory", "MiB of memory", q.MemoryMiB, limits.MemoryMiB},
		{"MiB of disk", "MiB of disk", q.DiskMiB, limits.DiskMiB},
	} {
		if l.limit > 0 && l.used > l.limit {
			return &l
		}
	}
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
