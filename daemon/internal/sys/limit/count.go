package limit

import "sync"

// Counts bounds how many of a kind each key has at a time, such as requests in progress.
type Counts struct {
	max   int
	mu    sync.Mutex
	byKey map[string]int
}

// NewCounts returns Counts of at most max for each key.
func NewCounts(max int) *Counts {
	return &Counts{max: max, byKey: map[string]int{}}
}

// Enter counts one more for a key, unless the key has the maximum, and reports whether it did.
func (c *Counts) Enter(key string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byKey[key] >= c.max {
		return false
	}
	c.byKey[key]++
	return true
}

// Leave ends what an Enter counted.
func (c *Counts) Leave(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byKey[key]--; c.byKey[key] == 0 {
		delete(c.byKey, key)
	}
}

// Keys returns how many keys have any.
func (c *Counts) Keys() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.byKey)
}
