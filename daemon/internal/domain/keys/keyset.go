package keys

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

// keySet is every key in memory, dead ones too, and what of them is in use. The Issuer changes it once a
// change is durable; the Verifier asks it. What it says is true from the moment on that a change returns.
type keySet struct {
	clock    *clock
	sessions *sessionCache

	mu sync.RWMutex
	// identity is that of the signing key whose tokens are taken.
	identity *identity
	byID     map[string]*key
	byName   map[string][]*key // dead ones, too
	byPrefix map[string][]*key // by the first minPrefix characters of the id
	// oldest is in the order of position.
	oldest []*key
	// reserved holds the names of keys that are being made.
	reserved map[string]struct{}
}

// key is a key in memory.
type key struct {
	Record           // guarded by keySet.mu; what its slices hold never changes
	session *session // guarded by keySet.mu; nil: not seen yet, or refused
	usage   usage
}

func newKeySet(c *clock, id *identity) *keySet {
	return &keySet{
		clock:    c,
		sessions: newSessionCache(),
		identity: id,
		byID:     make(map[string]*key),
		byName:   make(map[string][]*key),
		byPrefix: make(map[string][]*key),
		reserved: make(map[string]struct{}),
	}
}

// position orders keys by age.
type position struct {
	createdAt int64 // in milliseconds since 1970
	id        string
}

func prefix(id string) string { return id[:min(len(id), minPrefix)] }

func (k *key) position() position { return position{k.CreatedAt.UnixMilli(), k.ID} }

func (p position) compare(other position) int {
	return cmp.Or(cmp.Compare(p.createdAt, other.createdAt), cmp.Compare(p.id, other.id))
}

// snapshot is the key as others may have it. The caller holds keySet.mu.
func (k *key) snapshot() Key { return Key{Record: k.Record, Usage: k.usage.load()} }

// put adds keys or changes them. A key that is refused now loses what it has in progress.
func (ks *keySet) put(records ...Record) {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	var added []*key
	for _, r := range records {
		k, known := ks.byID[r.ID]
		if known {
			ks.unname(k)
			k.Record = r
			ks.refreshSession(k)
		} else {
			k = &key{Record: r}
			ks.byID[r.ID] = k
			ks.byPrefix[prefix(r.ID)] = append(ks.byPrefix[prefix(r.ID)], k)
			added = append(added, k)
		}
		if r.Name != "" {
			ks.byName[r.Name] = append(ks.byName[r.Name], k)
		}
	}
	switch len(added) {
	case 0:
	case 1:
		ks.oldest = slices.Insert(ks.oldest, ks.search(added[0].position()), added[0]) // near the end, as a rule
	default:
		ks.oldest = append(ks.oldest, added...)
		slices.SortFunc(ks.oldest, func(a, b *key) int { return a.position().compare(b.position()) })
	}
}

// load is put, with the usage, of what the store holds.
func (ks *keySet) load(saved Saved) {
	ks.put(saved.Records...)
	for id, use := range saved.Usage {
		if k, ok := ks.byID[id]; ok {
			k.usage.set(use)
		}
	}
}

// search finds where in ks.oldest a position is or belongs. The caller holds keySet.mu.
func (ks *keySet) search(p position) int {
	at, _ := slices.BinarySearchFunc(ks.oldest, p, func(k *key, p position) int { return k.position().compare(p) })
	return at
}

// remove forgets keys.
func (ks *keySet) remove(ids ...string) {
	if len(ids) == 0 {
		return
	}
	ks.mu.Lock()
	defer ks.mu.Unlock()
	gone := make(map[*key]bool, len(ids))
	for _, id := range ids {
		k := ks.byID[id]
		gone[k] = true
		ks.unname(k)
		ks.closeSession(k, &rejection{cause: causeUnknown, keyID: id})
		delete(ks.byID, id)
		drop(ks.byPrefix, prefix(id), k)
	}
	ks.oldest = slices.DeleteFunc(ks.oldest, func(k *key) bool { return gone[k] })
}

// unname takes a key out of ks.byName. The caller holds keySet.mu.
func (ks *keySet) unname(k *key) {
	if k.Name != "" {
		drop(ks.byName, k.Name, k)
	}
}

func drop(index map[string][]*key, at string, k *key) {
	if index[at] = slices.DeleteFunc(index[at], func(other *key) bool { return other == k }); len(index[at]) == 0 {
		delete(index, at)
	}
}

// trust takes only tokens of id from now on: those of every other signing key are refused.
func (ks *keySet) trust(id *identity) {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	ks.identity = id
	for _, k := range ks.byID {
		if k.SigningKeyID != id.keyID {
			ks.closeSession(k, &rejection{cause: causeReset, keyID: k.ID})
		}
	}
}

// trusted is whose tokens are taken.
func (ks *keySet) trusted() *identity {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	return ks.identity
}

// records returns all of them, the oldest first.
func (ks *keySet) records() []Record {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	records := make([]Record, len(ks.oldest))
	for n, k := range ks.oldest {
		records[n] = k.Record
	}
	return records
}

// deadSince returns the keys that were expired or revoked at a time, the oldest first.
func (ks *keySet) deadSince(at time.Time) (dead []Key) {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	for _, k := range ks.oldest {
		if k.StateAt(at) != Live {
			dead = append(dead, k.snapshot())
		}
	}
	return dead
}

func (ks *keySet) counts() (c Counts) {
	now := ks.clock.time()
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	for _, k := range ks.oldest {
		switch k.StateAt(now) {
		case Revoked:
			c.Revoked++
		case Expired:
			c.Expired++
		default:
			c.Live++
		}
	}
	return c
}

// usedSinceSaved is the usage of the keys that have a new one, by id.
func (ks *keySet) usedSinceSaved() map[string]*usage {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	used := make(map[string]*usage)
	for _, k := range ks.oldest {
		if k.usage.requests.Load() != k.usage.saved {
			used[k.ID] = &k.usage
		}
	}
	return used
}
