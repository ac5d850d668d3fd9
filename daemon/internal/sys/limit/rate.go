package limit

import (
	"math"
	"sync"

	"golang.org/x/time/rate"
)

// MaxRates is how many keys' rates a Rates remembers. The least recently used one is forgotten, and starts again with
// a full bucket.
const MaxRates = 16 << 10

// Rates bounds the calls of each key per second. A key that was quiet may make the calls of one second at once.
type Rates struct {
	perSecond rate.Limit
	burst     int

	mu    sync.Mutex
	byKey *LRU[string, *rate.Limiter]
}

// NewRates returns a Rates of so many calls per second and key; 0 is no bound.
func NewRates(perSecond float64) *Rates {
	return &Rates{
		perSecond: rate.Limit(perSecond),
		burst:     int(max(1, min(math.Ceil(perSecond), math.MaxInt32))),
		byKey:     NewLRU[string, *rate.Limiter](MaxRates),
	}
}

// Bucket holds the calls that a key may make now. The nil Bucket has no bound.
type Bucket rate.Limiter

// Of returns the bucket of a key.
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

// Take takes one call. If there is none, it returns in how many seconds there will be one, at least 1.
func (b *Bucket) Take() (wait int) {
	if b == nil || (*rate.Limiter)(b).Allow() {
		return 0
	}
	l := (*rate.Limiter)(b)
	seconds := (1 - l.Tokens()) / float64(l.Limit())
	return int(max(1, min(math.Ceil(seconds), math.MaxInt32)))
}

// Owe takes n calls more, whether or not there are any: what comes after them waits for longer. So a batch runs as a
// whole or not at all, and does not get its key more calls in the end.
func (b *Bucket) Owe(n int) {
	if b == nil {
		return
	}
	for range n {
		(*rate.Limiter)(b).Reserve()
	}
}
