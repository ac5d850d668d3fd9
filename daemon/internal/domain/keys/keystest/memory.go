// Package keystest has what tests of API keys need: a keys.Store in memory, and the contract that every
// keys.Store is tested against. Only tests import it.
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

// MemoryStore is a keys.Store that forgets everything with the process. It remembers the events that it
// was to log. It is safe for concurrent use.
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
	if err := m.mayFail(c); err != nil {
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
	for _, r := range c.Put {
		m.records[r.ID] = r
	}
	for _, id := range c.Delete {
		delete(m.records, id)
		delete(m.usage, id)
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
	if err := m.mayFail(keys.Change{}); err != nil {
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

func (m *MemoryStore) mayFail(c keys.Change) error {
	m.mu.Lock()
	fail := m.fail
	m.mu.Unlock()
	if fail == nil {
		return nil
	}
	return fail(c) // without the lock: it may wait for another change
}

// FailWith makes every change and every save of usage fail with err from now on; nil makes none fail.
func (m *MemoryStore) FailWith(err error) {
	m.FailIf(func(keys.Change) error { return err })
}

// FailIf has fail asked before each change, and before each save of usage with the empty Change. What it
// returns an error for fails with that.
func (m *MemoryStore) FailIf(fail func(keys.Change) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = fail
}

// Records returns all records by id.
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

// Used returns the usage and the time that were saved last.
func (m *MemoryStore) Used() (usage map[string]keys.Usage, latest time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.usage), m.latest
}

// Events returns the events since the last TakeEvents.
func (m *MemoryStore) Events() []audit.Event {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.events)
}

// TakeEvents returns the events since the last TakeEvents, and forgets them.
func (m *MemoryStore) TakeEvents() []audit.Event {
	m.mu.Lock()
	defer m.mu.Unlock()
	events := m.events
	m.events = nil
	return events
}
