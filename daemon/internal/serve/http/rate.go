package http

import (
	"math"
	"sync"

	"golang.org/x/time/rate"
)

// maxRates bounds how many keys' rates are remembered. One that is forgotten begins anew.
const maxRates = 16 << 10

// rates bounds the calls of each key per second; 0 is no bound. A key that was quiet may make those of
// one second at once.
type rates struct {
	perSecond rate.Limit
	burst     int

	mu    sync.Mutex
	byKey *lru[string, *rate.Limiter]
}

func newRates(perSecond float64) *rates {
	return &rates{
		perSecond: rate.Limit(perSecond),
		burst:     int(max(1, min(math.Ceil(perSecond), math.MaxInt32))),
		byKey:     newLRU[string, *rate.Limiter](maxRates),
	}
}

// of is the bucket from which a key's calls are taken; nil when there is no bound.
func (r *rates) of(keyID string) *rate.Limiter {
	if r.perSecond <= 0 {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	bucket, ok := r.byKey.get(keyID)
	if !ok {
		bucket = rate.NewLimiter(r.perSecond, r.burst)
		r.byKey.put(keyID, bucket)
	}
	return bucket
}

// takeCall takes a call from a bucket, or says in how many seconds there is one. Of a nil bucket there
// always is.
func takeCall(bucket *rate.Limiter) (wait int) {
	if bucket == nil || bucket.Allow() {
		return 0
	}
	seconds := (1 - bucket.Tokens()) / float64(bucket.Limit())
	return int(max(1, min(math.Ceil(seconds), math.MaxInt32)))
}

// oweCalls takes n calls more, whether or not they are there: what comes after them waits for longer.
// So a batch is run whole or not at all, and gets its key no more calls in the end.
func oweCalls(bucket *rate.Limiter, n int) {
	if bucket == nil {
		return
	}
	for range n {
		bucket.Reserve()
	}
}
