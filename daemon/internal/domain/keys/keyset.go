package keys

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"
)

// keySet holds all keys in memory, including expired and revoked ones, and the sessions of the keys in use. The
// Issuer updates it after a change is durable. The Verifier reads it, so it applies a change as soon as the update has
// returned.
type keySet struct {
	clock    *clock
	sessions *sessionCache

	mu sync.RWMutex
	// identity belongs to the signing key whose tokens are accepted.
	identity *identity
	byID     map[string]*key
	byName   map[string][]*key // includes expired and revoked keys
	byPrefix map[string][]*key // by the first minPrefix characters of the id
	// byAge holds all keys, ordered by position.
	byAge []*key
	// reserved holds the names of keys that are being created.
	reserved map[string]struct{}
	// pruned holds the tombstones of pruned keys, by id. These keys are in none of the fields above.
	pruned map[string]Record
}

// key is a key in memory.
type key struct {
	Record           // guarded by keySet.mu; the elements of its slices never change
	session *session // guarded by keySet.mu; nil if the key was not used since the start, or is refused
	usage   usage
	// checking is held while the signature of a token with the claims of this key is checked. It is locked before
	// Verifier.checking and keySet.mu.
	checking sync.Mutex
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
		pruned:   make(map[string]Record),
	}
}

// position orders keys by creation time, and by id if they were created in the same millisecond.
type position struct {
	createdAt int64 // in milliseconds since 1970
	id        string
}

func prefix(id string) string { return id[:min(len(id), minPrefix)] }

func (k *key) position() position { return position{k.CreatedAt.UnixMilli(), k.ID} }

func (p position) compare(other position) int {
	return cmp.Or(cmp.Compare(p.createdAt, other.createdAt), cmp.Compare(p.id, other.id))
}

// snapshot returns a copy of the key to be used without the lock. The caller holds keySet.mu.
func (k *key) snapshot() Key { return Key{Record: k.Record, Usage: k.usage.load()} }

// apply removes the keys and tombstones with the ids in remove, and then adds the records in put, in one step.
func (ks *keySet) apply(remove []string, put []Record) {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	ks.removeLocked(remove)
	ks.putLocked(put)
}

// put adds records, and replaces those whose id is already known. If the new record of a key says that the key is
// refused, put cancels the key's requests.
func (ks *keySet) put(records ...Record) { ks.apply(nil, records) }

// remove removes keys and tombstones, if they exist, and cancels the requests of the keys.
func (ks *keySet) remove(ids ...string) { ks.apply(ids, nil) }

// putLocked implements put. The caller holds ks.mu.
func (ks *keySet) putLocked(records []Record) {
	var pruned []string
	for _, r := range records {
		if r.Revocation == Pruned {
			pruned = append(pruned, r.ID)
		}
	}
	ks.removeLocked(pruned)
	var added []*key
	for _, r := range records {
		if r.Revocation == Pruned {
			ks.pruned[r.ID] = r
			continue
		}
		k, known := ks.byID[r.ID]
		if known {
			ks.unindexName(k)
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
		// A new key is usually the youngest, so that few elements have to move.
		ks.byAge = slices.Insert(ks.byAge, ks.search(added[0].position()), added[0])
	default:
		ks.byAge = append(ks.byAge, added...)
		slices.SortFunc(ks.byAge, func(a, b *key) int { return a.position().compare(b.position()) })
	}
}

// load puts the records from the store and sets the usage of their keys.
func (ks *keySet) load(saved Saved) {
	ks.put(saved.Records...)
	for id, use := range saved.Usage {
		if k, ok := ks.byID[id]; ok {
			k.usage.set(use)
		}
	}
}

// search returns the index in ks.byAge at which p is or would be inserted. The caller holds keySet.mu.
func (ks *keySet) search(p position) int {
	at, _ := slices.BinarySearchFunc(ks.byAge, p, func(k *key, p position) int { return k.position().compare(p) })
	return at
}

// removeLocked implements remove. The caller holds ks.mu.
func (ks *keySet) removeLocked(ids []string) {
	gone := make(map[*key]bool, len(ids))
	for _, id := range ids {
		delete(ks.pruned, id)
		k, ok := ks.byID[id]
		if !ok {
			continue
		}
		gone[k] = true
		ks.unindexName(k)
		ks.closeSession(k, &rejection{cause: causeUnknown, keyID: id})
		delete(ks.byID, id)
		unindex(ks.byPrefix, prefix(id), k)
	}
	if len(gone) > 0 {
		ks.byAge = slices.DeleteFunc(ks.byAge, func(k *key) bool { return gone[k] })
	}
}

// tombstones returns the tombstones of pruned keys, in no particular order.
func (ks *keySet) tombstones() []Record {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	return slices.Collect(maps.Values(ks.pruned))
}

// unindexName removes a key from ks.byName. The caller holds keySet.mu.
func (ks *keySet) unindexName(k *key) {
	if k.Name != "" {
		unindex(ks.byName, k.Name, k)
	}
}

// unindex removes k from the keys that index holds under entry.
func unindex(index map[string][]*key, entry string, k *key) {
	index[entry] = slices.DeleteFunc(index[entry], func(other *key) bool { return other == k })
	if len(index[entry]) == 0 {
		delete(index, entry)
	}
}

// trust makes id's signing key the only one whose tokens are accepted, and cancels the requests of all others.
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

// trusted returns the identity of the signing key whose tokens are accepted.
func (ks *keySet) trusted() *identity {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	return ks.identity
}

// records returns the records of all keys that were not pruned, oldest first.
func (ks *keySet) records() []Record {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	records := make([]Record, len(ks.byAge))
	for n, k := range ks.byAge {
		records[n] = k.Record
	}
	return records
}

// deadSince returns the keys that were already expired or revoked at the time at, oldest first.
func (ks *keySet) deadSince(at time.Time) (dead []Key) {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	for _, k := range ks.byAge {
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
	for _, k := range ks.byAge {
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

// usedSinceSaved returns, by id, the usage of the keys that were used since their usage was last saved.
func (ks *keySet) usedSinceSaved() map[string]*usage {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	used := make(map[string]*usage)
	for _, k := range ks.byAge {
		if k.usage.requests.Load() != k.usage.saved {
			used[k.ID] = &k.usage
		}
	}
	return used
}
