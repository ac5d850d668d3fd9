package limit

import "sync"

// Turns limits how many goroutines of each key work at a time. The others wait for their turn, in the order in which they
// asked for it.
type Turns struct {
	each  int
	mu    sync.Mutex
	byKey map[string]*turnsOfKey
}

// turnsOfKey exists while goroutines of the key have a turn or wait for one.
type turnsOfKey struct {
	users int
	taken chan struct{} // has an element for each goroutine that has a turn
}

// NewTurns returns Turns that give each key at most each turns at a time.
func NewTurns(each int) *Turns {
	return &Turns{each: each, byKey: map[string]*turnsOfKey{}}
}

// Take waits until key has a free turn, and takes it. Call Return when the work is done or interrupted.
func (t *Turns) Take(key string) {
	t.mu.Lock()
	k := t.byKey[key]
	if k == nil {
		k = &turnsOfKey{taken: make(chan struct{}, t.each)}
		t.byKey[key] = k
	}
	k.users++
	t.mu.Unlock()
	k.taken <- struct{}{}
}

// Return gives back a turn of key. Call it once for each Take.
func (t *Turns) Return(key string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := t.byKey[key]
	<-k.taken
	if k.users--; k.users == 0 {
		delete(t.byKey, key)
	}
}

// Users returns how many goroutines have a turn or wait for one.
func (t *Turns) Users() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for _, k := range t.byKey {
		n += k.users
	}
	return n
}
