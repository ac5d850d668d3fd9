package limit

import "sync"

// Budget bounds how many bytes are held: by each key, and by all of them together.
type Budget struct {
	// All and Each are the most bytes that all keys and one key may hold.
	All, Each int

	mu    sync.Mutex
	total int
	byKey map[string]int
}

// NewBudget returns a Budget of which nothing is held.
func NewBudget(all, each int) *Budget {
	return &Budget{All: all, Each: each, byKey: map[string]int{}}
}

// Excess says which bound of a Budget would have been passed.
type Excess int

const (
	// Within both bounds.
	Within Excess = iota
	// OverEach is the bound of one key.
	OverEach
	// OverAll is the bound of all keys together.
	OverAll
)

// Hold counts n more bytes for a key. If that would pass a bound, it counts nothing.
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

// Release ends the count of n bytes of a key.
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

// Held returns the bytes that all keys hold, and how many keys hold any.
func (b *Budget) Held() (bytes, keys int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.total, len(b.byKey)
}
