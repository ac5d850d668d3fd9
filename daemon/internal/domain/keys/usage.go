package keys

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
	// lastFrom points to an address without a zone, which never changes; nil is the zero Addr.
	lastFrom atomic.Pointer[netip.Addr]
	// saved is the requests that the store knows of; only Issuer.saveUsage touches it.
	saved uint64
}

// count counts one request.
func (u *usage) count(now int64, from netip.Addr) {
	u.requests.Add(1)
	u.lastAt.Store(now)
	u.setSource(from)
}

// setSource uses the heap only for an address other than the last one.
func (u *usage) setSource(a netip.Addr) {
	a = a.WithZone("")
	if last := u.lastFrom.Load(); last == nil || *last != a {
		from := a // so that only this branch has one on the heap
		u.lastFrom.Store(&from)
	}
}

func (u *usage) load() Usage {
	use := Usage{Requests: u.requests.Load()}
	if from := u.lastFrom.Load(); from != nil {
		use.LastUsedFrom = *from
	}
	if at := u.lastAt.Load(); at != 0 {
		use.LastUsedAt = moment(at)
	}
	return use
}

// set takes over what the store knew at the start.
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

// saveUsage saves the usage of the keys that were used since it last did, and the time. What could not
// be saved is saved the next time.
func (i *Issuer) saveUsage() {
	i.saving.Lock()
	defer i.saving.Unlock()
	used := i.keys.usedSinceSaved()
	changed := make(map[string]Usage, len(used))
	for id, u := range used {
		changed[id] = u.load()
	}
	if err := i.store.SaveUsage(changed, i.clock.time()); err != nil {
		i.log.Error("the usage of API keys cannot be saved; it is tried again", "keys", len(changed), "err", err)
		return
	}
	for id, u := range used {
		u.saved = changed[id].Requests
	}
}
