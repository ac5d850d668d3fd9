package disk

// Waiting returns how many calls of BuildImage wait for a build.
func (s *Store) Waiting() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.builds {
		b.mu.Lock()
		n += len(b.waiters)
		b.mu.Unlock()
	}
	return n
}
