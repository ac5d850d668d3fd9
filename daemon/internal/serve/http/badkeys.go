package http

import (
	"fmt"
	"net/netip"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/time/rate"

	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

const (
	// A source may send badKeysBurst bad keys at once, and badKeysPerSecond after that.
	badKeysBurst     = 100
	badKeysPerSecond = 20
	// maxSources is how many sources are remembered. The least recently used one is forgotten first.
	maxSources = 4096
)

var errTooManyBadKeys = fmt.Errorf("too many bad API keys from this address; wait a moment and try again: %w", errdefs.ErrResourceExhausted)

// badKeyLimiter limits how many bad keys from one source are checked, because each check verifies a signature. If a source
// is over the limit, only keys that were accepted before still work from there. So a bad client does not lock out the
// good clients behind the same address.
type badKeyLimiter struct {
	verifier Verifier
	mu       sync.RWMutex
	sources  *limit.LRU[netip.Prefix, *rate.Limiter]
}

func newBadKeyLimiter(v Verifier) *badKeyLimiter {
	return &badKeyLimiter{verifier: v, sources: limit.NewLRU[netip.Prefix, *rate.Limiter](maxSources)}
}

// allow reports whether a key from a source may be checked.
func (b *badKeyLimiter) allow(from netip.Prefix, key string) bool {
	b.mu.RLock()
	limiter, ok := b.sources.Peek(from)
	b.mu.RUnlock()
	return !ok || limiter.Tokens() >= 1 || b.verifier.Known(key)
}

// count counts a bad key against its source.
func (b *badKeyLimiter) count(from netip.Prefix) {
	b.mu.Lock()
	defer b.mu.Unlock()
	limiter, ok := b.sources.Get(from)
	if !ok {
		limiter = rate.NewLimiter(badKeysPerSecond, badKeysBurst)
		b.sources.Put(from, limiter)
	}
	limiter.Allow()
}
