// Package keystest helps to test API keys. It has a keys.Store in memory, and a contract suite for implementations of
// keys.Store. Only tests import it.
package keystest

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// MemoryStore is a keys.Store that holds everything in memory, including the events that a real store would write to
// the audit log. It is safe for concurrent use.
type MemoryStore struct {
	mu      sync.Mutex
	records map[string]keys.Record
	usage   map[string]keys.Usage
	latest  time.Time
	head    audit.Head
	events  []audit.Event
	fail    func(keys.Change) error
}

var _ keys.Store = (*MemoryStore)(nil)

// NewMemoryStore returns an empty MemoryStore.
func NewMemoryStore() *MemoryStore {
	return &MemoryStore{records: make(map[string]keys.Record), usage: make(map[string]keys.Usage)}
}

// LoadKeys implements keys.Store.
func (m *MemoryStore) LoadKeys() (keys.Saved, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return keys.Saved{Records: slices.Collect(maps.Values(m.records)), Usage: maps.Clone(m.usage), Latest: m.latest}, nil
}

// CommitKeys implements keys.Store.
func (m *MemoryStore) CommitKeys(c keys.Change) error {
	if err := m.injectedError(c); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range c.Put {
		if r.ID == "" {
			return fmt.Errorf("record without an id: %w", errdefs.ErrInvalidArgument)
		}
	}
	head := m.head
	for _, e := range c.Events {
		var err error
		if _, head, err = head.Append(time.Now(), e); err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	for _, id := range c.Delete {
		delete(m.records, id)
		delete(m.usage, id)
	}
	for _, r := range c.Put {
		m.records[r.ID] = r
	}
	if !c.Clock.IsZero() {
		m.latest = c.Clock
	}
	m.head = head
	m.events = append(m.events, c.Events...)
	return nil
}

// SaveUsage implements keys.Store.
func (m *MemoryStore) SaveUsage(usage map[string]keys.Usage, latest time.Time) error {
	if err := m.injectedError(keys.Change{}); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, u := range usage {
		if _, ok := m.records[id]; ok {
			m.usage[id] = u
		}
	}
	if latest.After(m.latest) {
		m.latest = latest
	}
	return nil
}

// injectedError returns the error that FailIf or FailWith has requested for c, or nil.
func (m *MemoryStore) injectedError(c keys.Change) error {
	m.mu.Lock()
	fail := m.fail
	m.mu.Unlock()
	if fail == nil {
		return nil
	}
	return fail(c) // without the lock, because fail may wait for another change
}

// FailWith makes CommitKeys and SaveUsage fail with err from now on. If err is nil, they succeed again.
func (m *MemoryStore) FailWith(err error) {
	m.FailIf(func(keys.Change) error { return err })
}

// FailIf makes CommitKeys and SaveUsage call fail first, and return its error if it returns one. CommitKeys passes its
// Change, and SaveUsage passes an empty one.
func (m *MemoryStore) FailIf(fail func(keys.Change) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = fail
}

// Records returns all records, by id.
func (m *MemoryStore) Records() map[string]keys.Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.records)
}

// SetRecords replaces all records.
func (m *MemoryStore) SetRecords(records map[string]keys.Record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.records = maps.Clone(records)
}

// Used returns the usage, by id, and the latest time that are stored.
func (m *MemoryStore) Used() (usage map[string]keys.Usage, latest time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.usage), m.latest
}

// Events returns the events since the last call of TakeEvents.
func (m *MemoryStore) Events() []audit.Event {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.events)
}

// TakeEvents returns the events since the last call of TakeEvents, and removes them.
func (m *MemoryStore) TakeEvents() []audit.Event {
	m.mu.Lock()
	defer m.mu.Unlock()
	events := m.events
	m.events = nil
	return events
}
