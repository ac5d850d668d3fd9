package http

import "sync"

// inFlight counts the requests that each key has in progress.
type inFlight struct {
	max   int
	mu    sync.Mutex
	byKey map[string]int
}

func newInFlight(max int) *inFlight {
	return &inFlight{max: max, byKey: map[string]int{}}
}

// enter counts one more request, unless the key has its maximum.
func (f *inFlight) enter(keyID string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.byKey[keyID] >= f.max {
		return false
	}
	f.byKey[keyID]++
	return true
}

func (f *inFlight) leave(keyID string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.byKey[keyID]--; f.byKey[keyID] == 0 {
		delete(f.byKey, keyID)
	}
}
