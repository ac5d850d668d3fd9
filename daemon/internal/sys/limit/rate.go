package limit

import (
	"math"
	"sync"

	"golang.org/x/time/rate"
)

// MaxRates is the number of keys whose buckets a Rates keeps. If there are more keys, the least recently used bucket is
// dropped. Its key starts again with a full bucket.
const MaxRates = 16 << 10

// Rates limits the calls per second of each key. A key that made no calls for a while may make the calls of one second at
// once.
type Rates struct {
	perSecond rate.Limit
	burst     int

	mu    sync.Mutex
	byKey *LRU[string, *rate.Limiter]
}

// NewRates returns a Rates that allows each key perSecond calls per second; 0 means unlimited.
func NewRates(perSecond float64) *Rates {
	return &Rates{
		perSecond: rate.Limit(perSecond),
		burst:     int(max(1, min(math.Ceil(perSecond), math.MaxInt32))),
		byKey:     NewLRU[string, *rate.Limiter](MaxRates),
	}
}

// Bucket is a token bucket with the calls that a key may make now. A nil Bucket is unlimited.
type Bucket rate.Limiter

// Of returns the bucket of key.
func (r *Rates) Of(key string) *Bucket {
	if r.perSecond <= 0 {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	bucket, ok := r.byKey.Get(key)
	if !ok {
		bucket = rate.NewLimiter(r.perSecond, r.burst)
		r.byKey.Put(key, bucket)
	}
	return (*Bucket)(bucket)
}

// Take takes one call from the bucket and returns 0. If the bucket is empty, Take returns the number of seconds, at
// least 1, until a call is available.
func (b *Bucket) Take() (wait int) {
	if b == nil || (*rate.Limiter)(b).Allow() {
		return 0
	}
	l := (*rate.Limiter)(b)
	seconds := (1 - l.Tokens()) / float64(l.Limit())
	return int(max(1, min(math.Ceil(seconds), math.MaxInt32)))
}

// Owe takes n calls from the bucket even if it has fewer, so that later calls wait longer. A batch runs either
// completely or not at all, and calls Owe so that its key still gets no more calls than the rate allows.
func (b *Bucket) Owe(n int) {
	if b == nil {
		return
	}
	for range n {
		(*rate.Limiter)(b).Reserve()
	}
}
