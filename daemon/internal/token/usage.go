package token

import (
	"net/netip"
	"sync/atomic"
	"time"
)

// usage counts the use of a key. It is counted in memory and saved by Run: a process that is killed
// forgets up to usageInterval of it.
type usage struct {
	requests atomic.Uint64
	lastAt   atomic.Int64 // in microseconds since 1970; 0: never
	lastFrom atomic.Pointer[netip.Addr]
	// saved is the requests that the store knows of; only Issuer.saveUsage touches it.
	saved uint64
}

// count takes down one request. It allocates only for another source than the last one.
func (u *usage) count(now int64, from netip.Addr) {
	u.requests.Add(1)
	u.lastAt.Store(now)
	if last := u.lastFrom.Load(); last == nil || *last != from {
		moved := from // else from itself would be on the heap, always
		u.lastFrom.Store(&moved)
	}
}

func (u *usage) load() Usage {
	use := Usage{Requests: u.requests.Load()}
	if at := u.lastAt.Load(); at != 0 {
		use.LastUsedAt = moment(at)
	}
	if from := u.lastFrom.Load(); from != nil {
		use.LastUsedFrom = *from
	}
	return use
}

// set is what the store knew at the start.
func (u *usage) set(use Usage) {
	u.requests.Store(use.Requests)
	u.saved = use.Requests
	if !use.LastUsedAt.IsZero() {
		u.lastAt.Store(use.LastUsedAt.UnixMicro())
	}
	u.lastFrom.Store(&use.LastUsedFrom)
}

// usageInterval is how often the usage of keys is saved.
const usageInterval = time.Minute

// saveUsage saves the usage of the keys that were used since it last did, and the time. What could not
// be saved is saved the next time.
func (i *Issuer) saveUsage() {
	// A reset sets the time back, which must not come between.
	i.mu.RLock()
	defer i.mu.RUnlock()
	i.saving.Lock()
	defer i.saving.Unlock()
	used := i.keys.usedSinceSaved()
	usage := make(map[string]Usage, len(used))
	for _, k := range used {
		usage[k.ID] = k.usage.load()
	}
	if err := i.store.SaveUsage(usage, i.clock.time()); err != nil {
		i.log.Error("the usage of API keys cannot be saved; it is tried again", "keys", len(usage), "err", err)
		return
	}
	for _, k := range used {
		k.usage.saved = usage[k.ID].Requests
	}
}
