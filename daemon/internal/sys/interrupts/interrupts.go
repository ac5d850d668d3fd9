// Package interrupts lets one request interrupt an operation of another request, which it names.
package interrupts

import "sync"

// Set has the operations in progress that can be interrupted, by key. The zero value is empty. Its methods may be called
// concurrently.
type Set[K comparable] struct {
	mu  sync.Mutex
	all map[K]chan struct{}
}

// Add adds an operation. It returns a channel that has a value after each interrupt; interrupts that come while it has one count as
// one. The caller must call remove when the operation has ended. If the key belongs to another operation in progress, ok is false.
func (s *Set[K]) Add(key K) (interrupts <-chan struct{}, remove func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all[key] != nil {
		return nil, nil, false
	}
	if s.all == nil {
		s.all = map[K]chan struct{}{}
	}
	added := make(chan struct{}, 1)
	s.all[key] = added
	return added, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.all, key)
	}, true
}

// Interrupt interrupts an operation. It reports whether there is one with this key.
func (s *Set[K]) Interrupt(key K) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	interrupts := s.all[key]
	if interrupts == nil {
		return false
	}
	select {
	case interrupts <- struct{}{}:
	default:
	}
	return true
}
