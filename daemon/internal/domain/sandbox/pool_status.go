package sandbox

import (
	"context"
	"slices"
	"time"
)

// poolMeasure is how often the loop measures the entries.
const poolMeasure = time.Minute

// measure measures what the entries use.
func (p *pool) measure(ctx context.Context) {
	p.mu.Lock()
	due := time.Since(p.measuredAt) >= poolMeasure
	entries := slices.Clone(p.entries)
	if due {
		p.measuredAt = time.Now()
	}
	p.mu.Unlock()
	for _, e := range entries {
		if !due && e.memory > 0 { // only this loop changes it
			continue
		}
		limited, cancel := context.WithTimeout(ctx, measureTimeout)
		usage, err := p.m.Runtime.Usage(limited, e.id)
		cancel()
		if err != nil {
			continue // if the microVM has ended, its watcher knows
		}
		p.mu.Lock()
		e.cpu, e.memory = usage.CPUTime, usage.MemoryBytes
		p.mu.Unlock()
	}
}

// PoolStatus describes the pool.
type PoolStatus struct {
	// Off says why there is no pool. It is empty if there is one.
	Off string
	// MemoryMiB is the sum of the memory that the entries may use, and MaxMemoryMiB its limit.
	MemoryMiB, MaxMemoryMiB int
	Templates               []TemplateStatus
}

// TemplateStatus describes the entries of the pool with one template.
type TemplateStatus struct {
	PoolSize
	Default bool
	// Target is how many entries there should be now.
	Target int
	// Ready is the number of entries that a start can take now, and Filling says that one is being started.
	Ready   int
	Filling bool
	// Hits and Misses are the numbers of starts that took an entry, and that found none.
	Hits, Misses uint64
	// Failures is how many refills have failed, and LastError why the last one has, if no other has succeeded since. It may name
	// parts of the host.
	Failures  uint64
	LastError string
	// Waits says why no entry is started although one is missing. RetryAt is when the next one is tried after a failure.
	Waits   string
	RetryAt time.Time
	// Entries are the entries, from the oldest to the newest. A start takes the oldest one that is ready.
	Entries []EntryStatus
}

// EntryStatus describes an entry of the pool.
type EntryStatus struct {
	ID        string
	CreatedAt time.Time
	// CPU and MemoryBytes are what the entry had used, and used, when it was measured, which is done each minute.
	CPU         time.Duration
	MemoryBytes uint64
}

// PoolStatus describes the pool. It does not block.
func (m *Manager) PoolStatus() PoolStatus {
	p := &m.pool
	s := PoolStatus{Off: p.off()}
	if s.Off != "" {
		return s
	}
	now := time.Now()
	shapes := p.sorted()
	p.mu.Lock()
	defer p.mu.Unlock()
	s.MaxMemoryMiB = p.budget()
	for _, shape := range shapes {
		t := TemplateStatus{
			PoolSize: shape.PoolSize, Default: shape.Template == p.def, Target: shape.target(now), Filling: p.filling != nil && *p.filling == shape.Template,
			Hits: shape.hits, Misses: shape.misses, Failures: shape.failures, LastError: shape.lastError, Waits: shape.waits,
		}
		if shape.retryAt.After(now) {
			t.RetryAt = shape.retryAt
		}
		if shape.digest == "" && shape.Max > 0 {
			t.Waits = "the image has not been imported"
		}
		for _, e := range p.entries {
			if e.template != shape.Template {
				continue
			}
			s.MemoryMiB += e.template.MemoryMiB
			if e.conn != nil { // otherwise a start does not take it yet
				t.Ready++
			}
			t.Entries = append(t.Entries, EntryStatus{e.id, e.createdAt, e.cpu, e.memory})
		}
		s.Templates = append(s.Templates, t)
	}
	return s
}
