package gateway

import (
	"container/list"
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
	maxAccepted = 4096
)

var errTooManyTries = fmt.Errorf("too many bad API keys from this address; wait a moment: %w", errdefs.ErrResourceExhausted)

// tries bounds how many bad keys a source may have checked, since a check costs cryptography. A
// source over its bound loses only new keys: those that were accepted before go on working, so that
// a bad client does not lock out the good ones behind the same address.
type tries struct {
	mu      sync.Mutex
	sources *lru[netip.Prefix, *rate.Limiter]
	// accepted holds hashes. A collision lets a key through to be checked, no more.
	accepted *lru[uint64, struct{}]
	seed     maphash.Seed
}

func newTries() *tries {
	return &tries{
		sources:  newLRU[netip.Prefix, *rate.Limiter](maxSources),
		accepted: newLRU[uint64, struct{}](maxAccepted),
		seed:     maphash.MakeSeed(),
	}
}

// allowed says whether the key may be checked.
func (t *tries) allowed(from netip.Prefix, key string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	bucket, ok := t.sources.get(from)
	if !ok || bucket.Tokens() >= 1 {
		return true
	}
	_, known := t.accepted.get(maphash.String(t.seed, key))
	return known
}

func (t *tries) succeeded(key string) {
	hash := maphash.String(t.seed, key)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.accepted.put(hash, struct{}{})
}

func (t *tries) failed(from netip.Prefix) {
	t.mu.Lock()
	defer t.mu.Unlock()
	bucket, ok := t.sources.get(from)
	if !ok {
		bucket = rate.NewLimiter(triesPerSecond, triesBurst)
		t.sources.put(from, bucket)
	}
	bucket.Allow()
}

// source is the network that one client has for itself: an IPv4 address, or an IPv6 /64. The zero
// Prefix stands for every address that cannot be read.
func source(remoteAddr string) netip.Prefix {
	ap, err := netip.ParseAddrPort(remoteAddr)
	if err != nil {
		return netip.Prefix{}
	}
	addr := ap.Addr().Unmap().WithZone("")
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	p, _ := addr.Prefix(bits) // the bits fit the address
	return p
}

// lru is a map that forgets what was used longest ago.
type lru[K comparable, V any] struct {
	max     int
	entries map[K]*list.Element
	order   *list.List // of entry, the latest in front
}

type entry[K comparable, V any] struct {
	key   K
	value V
}

func newLRU[K comparable, V any](max int) *lru[K, V] {
	return &lru[K, V]{max: max, entries: map[K]*list.Element{}, order: list.New()}
}

func (l *lru[K, V]) get(key K) (value V, ok bool) {
	e, ok := l.entries[key]
	if !ok {
		return value, false
	}
	l.order.MoveToFront(e)
	return e.Value.(entry[K, V]).value, true
}

func (l *lru[K, V]) put(key K, value V) {
	if e, ok := l.entries[key]; ok {
		e.Value = entry[K, V]{key, value}
		l.order.MoveToFront(e)
		return
	}
	l.entries[key] = l.order.PushFront(entry[K, V]{key, value})
	if l.order.Len() > l.max {
		oldest := l.order.Back()
		delete(l.entries, l.order.Remove(oldest).(entry[K, V]).key)
	}
}
