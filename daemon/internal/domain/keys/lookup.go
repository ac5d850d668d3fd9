package keys

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// minPrefix is the minimum length of a prefix of an id that identifies a key.
const minPrefix = 4

// Find returns the key that ref identifies: by its id, its name, or an unambiguous prefix of its id with at least 4
// characters. If several keys have the name, Find returns the one that is live and has not been rotated, or else the
// only one that is live. If there is no such key, ref is ambiguous. The error is errdefs.ErrNotFound, or errdefs.ErrInvalidArgument if ref
// is ambiguous.
func (i *Issuer) Find(ref string) (Key, error) { return i.keys.find(ref) }

// find implements Find. An id has precedence over a name. If ref is the name of one key and a prefix of the id of
// another, it is ambiguous.
func (ks *keySet) find(ref string) (Key, error) {
	now := ks.clock.time()
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	if k, ok := ks.byID[ref]; ok {
		return k.snapshot(), nil
	}
	found := ks.meant(ref, now)
	if len(ref) >= minPrefix {
		for _, k := range ks.byPrefix[prefix(ref)] {
			if strings.HasPrefix(k.ID, ref) && !slices.Contains(found, k) {
				found = append(found, k)
			}
		}
	}
	switch len(found) {
	case 0:
		return Key{}, fmt.Errorf("no API key has the name or id %q: see 'msb server key list': %w", bounded.Short(ref), errdefs.ErrNotFound)
	case 1:
		return found[0].snapshot(), nil
	}
	const most = 8
	var ids []string
	for _, k := range found[:min(len(found), most)] {
		ids = append(ids, k.ID)
	}
	if more := len(found) - most; more > 0 {
		ids = append(ids, fmt.Sprintf("%d more", more))
	}
	return Key{}, fmt.Errorf("%q is ambiguous: it matches the API keys %s; use the complete id or a longer prefix: %w",
		bounded.Short(ref), strings.Join(ids, ", "), errdefs.ErrInvalidArgument)
}

// meant returns the keys that a name means: those that hold it, or else the live ones with it, or else all with it. The
// caller holds keySet.mu.
func (ks *keySet) meant(name string, now time.Time) []*key {
	if holders := ks.nameHolders(name, now); len(holders) > 0 {
		return holders
	}
	var live []*key
	for _, k := range ks.byName[name] {
		if k.StateAt(now) == Live {
			live = append(live, k)
		}
	}
	if len(live) > 0 {
		return live
	}
	return slices.Clone(ks.byName[name])
}

// nameHolders returns the keys that hold a name. There is at most one, unless the disk failed: if the commit of a new
// key returns an error, its name is free for another key, but the first key may turn out to be stored after a
// restart. The caller holds keySet.mu.
func (ks *keySet) nameHolders(name string, now time.Time) (holders []*key) {
	for _, k := range ks.byName[name] {
		if k.holdsName(now) {
			holders = append(holders, k)
		}
	}
	return holders
}

// holdsName reports whether the key has a name that no other key may get.
func (r Record) holdsName(now time.Time) bool {
	return r.Name != "" && r.StateAt(now) == Live && r.ReplacedBy == ""
}

// reserve reserves a name for a key that is being created, until release is called. The name may be empty.
func (ks *keySet) reserve(name string) error {
	if name == "" {
		return nil
	}
	now := ks.clock.time()
	ks.mu.Lock()
	defer ks.mu.Unlock()
	if holders := ks.nameHolders(name, now); len(holders) > 0 {
		return fmt.Errorf("API key %s has the name %q: choose another name, or revoke or rotate that key: %w",
			holders[0].ID, name, errdefs.ErrAlreadyExists)
	}
	if _, ok := ks.reserved[name]; ok {
		return fmt.Errorf("another API key with the name %q is being created: choose another name: %w",
			name, errdefs.ErrAlreadyExists)
	}
	ks.reserved[name] = struct{}{}
	return nil
}

func (ks *keySet) release(name string) {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	delete(ks.reserved, name)
}
