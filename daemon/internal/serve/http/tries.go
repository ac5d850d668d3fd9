package http

import (
	"fmt"
	"hash/maphash"
	"net/netip"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/time/rate"
)

const (
	// A source may try triesBurst bad keys at once, and triesPerSecond from then on.
	triesBurst     = 100
	triesPerSecond = 20
	// maxSources and maxAccepted bound what is remembered.
	maxSources  = 4096
	maxAccepted = 16 << 10
)

var errTooManyTries = fmt.Errorf("too many bad API keys from this address; wait a moment: %w", errdefs.ErrResourceExhausted)

// tries bounds how many bad keys a source may have checked, since a check costs cryptography. A
// source over its bound loses only new keys: those that were accepted before go on working, so that
// a bad client does not lock out the good ones behind the same address.
type tries struct {
	mu      sync.RWMutex
	sources *lru[netip.Prefix, *rate.Limiter]
	// accepted holds hashes. A collision lets a key through to be checked, no more.
	accepted map[uint64]struct{}
	seed     maphash.Seed
}

func newTries() *tries {
	return &tries{
		sources:  newLRU[netip.Prefix, *rate.Limiter](maxSources),
		accepted: map[uint64]struct{}{},
		seed:     maphash.MakeSeed(),
	}
}

// allowed says whether the key may be checked.
func (t *tries) allowed(from netip.Prefix, key string) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	bucket, ok := t.sources.peek(from)
	if !ok || bucket.Tokens() >= 1 {
		return true
	}
	_, known := t.accepted[maphash.String(t.seed, key)]
	return known
}

// succeeded remembers a key that was accepted. With each request, it is already there.
func (t *tries) succeeded(key string) {
	hash := maphash.String(t.seed, key)
	t.mu.RLock()
	_, known := t.accepted[hash]
	t.mu.RUnlock()
	if known {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.accepted) >= maxAccepted {
		for other := range t.accepted { // map order: an arbitrary one
			delete(t.accepted, other)
			break
		}
	}
	t.accepted[hash] = struct{}{}
}

// failed counts a key that was refused against its source.
func (t *tries) failed(from netip.Prefix, key string) {
	hash := maphash.String(t.seed, key)
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.accepted, hash) // it ended: from now on it is as bad as any other
	bucket, ok := t.sources.get(from)
	if !ok {
		bucket = rate.NewLimiter(triesPerSecond, triesBurst)
		t.sources.put(from, bucket)
	}
	bucket.Allow()
}
