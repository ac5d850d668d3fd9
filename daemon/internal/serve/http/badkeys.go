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
	// A source may try badKeysBurst bad keys at once, and badKeysPerSecond from then on.
	badKeysBurst     = 100
	badKeysPerSecond = 20
	// maxSources bounds how many sources are remembered.
	maxSources = 4096
)

var errTooManyBadKeys = fmt.Errorf("too many bad API keys from this address; wait a moment: %w", errdefs.ErrResourceExhausted)

// badKeyLimiter bounds how many bad keys a source may have checked, since a check costs cryptography. A
// source over its bound loses only new keys: those that were accepted before still work, so that
// a bad client does not lock out the good ones behind the same address.
type badKeyLimiter struct {
	verifier Verifier
	mu       sync.RWMutex
	sources  *limit.LRU[netip.Prefix, *rate.Limiter]
}

func newBadKeyLimiter(v Verifier) *badKeyLimiter {
	return &badKeyLimiter{verifier: v, sources: limit.NewLRU[netip.Prefix, *rate.Limiter](maxSources)}
}

// allow reports whether a key of a source may be checked.
func (b *badKeyLimiter) allow(from netip.Prefix, key string) bool {
	b.mu.RLock()
	bucket, ok := b.sources.Peek(from)
	b.mu.RUnlock()
	return !ok || bucket.Tokens() >= 1 || b.verifier.Known(key)
}

// count counts a key that was refused against its source.
func (b *badKeyLimiter) count(from netip.Prefix) {
	b.mu.Lock()
	defer b.mu.Unlock()
	bucket, ok := b.sources.Get(from)
	if !ok {
		bucket = rate.NewLimiter(badKeysPerSecond, badKeysBurst)
		b.sources.Put(from, bucket)
	}
	bucket.Allow()
}
