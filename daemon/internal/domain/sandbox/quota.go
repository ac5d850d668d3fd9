package sandbox

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// Quota bounds what the sandboxes of one tenant namespace may hold at a time. A field that is 0 bounds
// nothing. Failed sandboxes hold nothing.
type Quota struct {
	Sandboxes, CPUs, MemoryMiB int
	// Runs bounds the code and command runs in progress, those that wait for their turn included.
	Runs int
}

// reserve counts what a sandbox with cfg will hold against its namespace's quota, until the entry's record says so.
// The error is errdefs.ErrResourceExhausted. The caller holds the entry's lock, and ends the reservation with
// setReserved(nil).
func (m *Manager) reserve(e *entry, cfg Config) error {
	namespace := e.name.Namespace
	q := m.Quota(namespace)
	m.mu.Lock()
	defer m.mu.Unlock()
	held := Quota{Sandboxes: 1, CPUs: cfg.CPUs, MemoryMiB: cfg.MemoryMiB}
	for name, other := range m.entries {
		if name.Namespace != namespace || other == e {
			continue
		}
		if c, holds := other.holds(); holds {
			held.Sandboxes++
			held.CPUs += c.CPUs
			held.MemoryMiB += c.MemoryMiB
		}
	}
	for _, bound := range []struct {
		what       string
		held, most int
	}{
		{"sandboxes", held.Sandboxes, q.Sandboxes},
		{"virtual processors", held.CPUs, q.CPUs},
		{"MiB of memory", held.MemoryMiB, q.MemoryMiB},
	} {
		if bound.most > 0 && bound.held > bound.most {
			return fmt.Errorf("namespace %s may hold %d %s at a time, and this start would make it %d: stop a sandbox of it first, "+
				"or ask the server's administrator for more: %w", namespace, bound.most, bound.what, bound.held, errdefs.ErrResourceExhausted)
		}
	}
	e.setReserved(&cfg)
	return nil
}

// enterRun counts one more run in a tenant namespace; leave ends it.
func (m *Manager) enterRun(namespace string) (leave func(), err error) {
	most := m.Quota(namespace).Runs
	m.mu.Lock()
	defer m.mu.Unlock()
	if most > 0 && m.runs[namespace] >= most {
		return nil, fmt.Errorf("namespace %s may have %d runs in progress at a time: wait for one to end: %w",
			namespace, most, errdefs.ErrResourceExhausted)
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
