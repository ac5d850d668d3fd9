package keys

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"sync/atomic"
	"time"
)

// usage counts the use of a key. It is counted in memory and saved by Run: a process that is killed
// forgets up to usageInterval of it.
type usage struct {
	requests atomic.Uint64
	lastAt   atomic.Int64 // in microseconds since 1970; 0: never
	lastFrom source
	// saved is the requests that the store knows of; only Issuer.saveUsage touches it.
	saved uint64
}

// count takes down one request.
func (u *usage) count(now int64, from netip.Addr) {
	u.requests.Add(1)
	u.lastAt.Store(now)
	u.lastFrom.store(from)
}

func (u *usage) load() Usage {
	use := Usage{Requests: u.requests.Load(), LastUsedFrom: u.lastFrom.load()}
	if at := u.lastAt.Load(); at != 0 {
		use.LastUsedAt = moment(at)
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
	u.lastFrom.store(use.LastUsedFrom)
}

// source is an address, without a zone, that many set at once, without a lock or the heap.
type source struct {
	// version is odd while somebody sets the rest.
	version   atomic.Uint32
	bits      atomic.Uint32 // that the address has; 0: the zero Addr
	high, low atomic.Uint64 // of its 16 byte form
}

// store leaves it to others who do so at the same moment: one of them is the last.
func (s *source) store(a netip.Addr) {
	b := a.As16()
	bits, high, low := uint32(a.BitLen()), binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
	if s.low.Load() == low && s.high.Load() == high && s.bits.Load() == bits {
		return
	}
	version := s.version.Load()
	if version%2 == 1 || !s.version.CompareAndSwap(version, version+1) {
		return
	}
	s.bits.Store(bits)
	s.high.Store(high)
	s.low.Store(low)
	s.version.Store(version + 2)
}

func (s *source) load() netip.Addr {
	for {
		version := s.version.Load()
		bits, high, low := s.bits.Load(), s.high.Load(), s.low.Load()
		if version%2 == 1 || s.version.Load() != version {
			runtime.Gosched()
			continue
		}
		var b [16]byte
		binary.BigEndian.PutUint64(b[:8], high)
		binary.BigEndian.PutUint64(b[8:], low)
		switch bits {
		case 0:
			return netip.Addr{}
		case 32:
			return netip.AddrFrom16(b).Unmap()
		default:
			return netip.AddrFrom16(b)
		}
	}
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
