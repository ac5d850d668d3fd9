package keys

import (
	"net/netip"
	"sync/atomic"
	"time"
)

// usage records the usage of a key in memory. Issuer.Run saves it to the Store. If the process is killed, the usage
// of up to usageInterval is lost.
type usage struct {
	requests atomic.Uint64
	lastAt   atomic.Int64 // in microseconds since 1970; 0 means never
	// lastFrom points to an address without a zone, which is never modified. nil means the zero Addr.
	lastFrom atomic.Pointer[netip.Addr]
	// saved is the value of requests in the store. After the start, only Issuer.saveUsage uses it.
	saved uint64
}

// count records one request from the address from at the time now, in microseconds since 1970.
func (u *usage) count(now int64, from netip.Addr) {
	u.requests.Add(1)
	u.lastAt.Store(now)
	u.setSource(from)
}

// setSource sets lastFrom. It allocates only if a differs from the last address.
func (u *usage) setSource(a netip.Addr) {
	a = a.WithZone("")
	if last := u.lastFrom.Load(); last == nil || *last != a {
		from := a // a copy, so that a itself is not allocated on the heap in every call
		u.lastFrom.Store(&from)
	}
}

func (u *usage) load() Usage {
	use := Usage{Requests: u.requests.Load()}
	if from := u.lastFrom.Load(); from != nil {
		use.LastUsedFrom = *from
	}
	if at := u.lastAt.Load(); at != 0 {
		use.LastUsedAt = fromMicros(at)
	}
	return use
}

// set sets the usage that was loaded from the store at the start.
func (u *usage) set(use Usage) {
	u.requests.Store(use.Requests)
	u.saved = use.Requests
	if !use.LastUsedAt.IsZero() {
		u.lastAt.Store(use.LastUsedAt.UnixMicro())
	}
	u.setSource(use.LastUsedFrom)
}

// usageInterval is how often the usage of keys is saved.
const usageInterval = time.Minute

// saveUsage saves the time, if it is confirmed, and the usage of the keys that were used since the last save. If that
// fails, the next call saves them.
func (i *Issuer) saveUsage() {
	i.saving.Lock()
	defer i.saving.Unlock()
	used := i.keys.usedSinceSaved()
	changed := make(map[string]Usage, len(used))
	for id, u := range used {
		changed[id] = u.load()
	}
	if err := i.store.SaveUsage(changed, i.clock.trustedTime()); err != nil {
		i.log.Error("could not save the usage of API keys; will try again", "keys", len(changed), "err", err)
		return
	}
	for id, u := range used {
		u.saved = changed[id].Requests
	}
}
