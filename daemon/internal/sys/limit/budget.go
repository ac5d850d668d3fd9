package limit

import "sync"

// Budget limits how many bytes each key holds, and how many all keys hold together.
type Budget struct {
	// All is the maximum number of bytes that all keys together may hold.
	All int
	// Each is the maximum number of bytes that one key may hold.
	Each int

	mu    sync.Mutex
	total int
	byKey map[string]int
}

// NewBudget returns a Budget with these limits and no bytes held.
func NewBudget(all, each int) *Budget {
	return &Budget{All: all, Each: each, byKey: map[string]int{}}
}

// Excess is the result of Hold. It says which limit of a Budget prevented Hold from adding bytes, if any.
type Excess int

const (
	// Within means that no limit was exceeded.
	Within Excess = iota
	// OverEach means that the key would hold more than Each bytes.
	OverEach
	// OverAll means that all keys together would hold more than All bytes.
	OverAll
)

// Hold adds n bytes to the number that key holds, and returns Within. If that would exceed a limit, Hold adds nothing
// and returns the limit.
func (b *Budget) Hold(key string, n int) Excess {
	if n == 0 {
		return Within
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.byKey[key]+n > b.Each:
		return OverEach
	case b.total+n > b.All:
		return OverAll
	}
	b.total += n
	b.byKey[key] += n
	return Within
}

// Release subtracts n bytes from the number that key holds.
func (b *Budget) Release(key string, n int) {
	if n == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.total -= n
	if b.byKey[key] -= n; b.byKey[key] == 0 {
		delete(b.byKey, key)
	}
}

// Held returns how many bytes all keys hold together, and how many keys hold any.
func (b *Budget) Held() (bytes, keys int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.total, len(b.byKey)
}
