package limit

import "sync"

// Counts limits how many things of a kind each key has at a time, such as requests in progress.
type Counts struct {
	max   int
	mu    sync.Mutex
	byKey map[string]int
}

// NewCounts returns Counts that allow each key at most max.
func NewCounts(max int) *Counts {
	return &Counts{max: max, byKey: map[string]int{}}
}

// Enter adds 1 to the count of key and returns true. If the count has reached the maximum, Enter only returns false.
func (c *Counts) Enter(key string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byKey[key] >= c.max {
		return false
	}
	c.byKey[key]++
	return true
}

// Leave subtracts 1 from the count of key. Call it once for each Enter that returned true.
func (c *Counts) Leave(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byKey[key]--; c.byKey[key] == 0 {
		delete(c.byKey, key)
	}
}

// Keys returns the number of keys whose count is not zero.
func (c *Counts) Keys() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.byKey)
}
