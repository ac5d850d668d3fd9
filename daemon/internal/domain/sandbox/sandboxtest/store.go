package sandboxtest

import (
	"maps"
	"slices"
	"sync"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// Store is a sandbox.Store that forgets with the process.
type Store struct {
	mu      sync.Mutex
	records map[string]sandbox.Record
	err     error
}

// NewStore returns an empty Store.
func NewStore() *Store { return &Store{records: map[string]sandbox.Record{}} }

// Fail makes every write from now on fail with err, or succeed again if it is nil.
func (s *Store) Fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

// PutSandbox implements sandbox.Store.
func (s *Store) PutSandbox(r sandbox.Record) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.records[r.ID] = r
	}
	return s.err
}

// DeleteSandbox implements sandbox.Store.
func (s *Store) DeleteSandbox(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		delete(s.records, id)
	}
	return s.err
}

// Sandboxes implements sandbox.Store.
func (s *Store) Sandboxes() ([]sandbox.Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.records)), nil
}
