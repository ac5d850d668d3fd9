package keys

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// minPrefix is how much of an id it takes to name a key.
const minPrefix = 4

// Find returns the key that ref names: its id, its name, or an unambiguous beginning of its id of at
// least 4 characters. A name that several keys had is that of the one which is live and not being
// replaced; of several such, it is ambiguous. errdefs.ErrNotFound, or errdefs.ErrInvalidArgument when ref is ambiguous.
func (i *Issuer) Find(ref string) (Key, error) { return i.keys.find(ref) }

// find returns the key that ref names: the id before a name, a name before the beginning of an id, unless
// they are two keys'.
func (ks *keySet) find(ref string) (Key, error) {
	now := ks.clock.time()
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	if k, ok := ks.byID[ref]; ok {
		return k.snapshot(), nil
	}
	var found []*key
	if found = ks.nameHolders(ref, now); len(found) == 0 {
		found = append(found, ks.byName[ref]...)
	}
	if len(ref) >= minPrefix {
		for _, k := range ks.byPrefix[prefix(ref)] {
			if strings.HasPrefix(k.ID, ref) && !slices.Contains(found, k) {
				found = append(found, k)
			}
		}
	}
	switch len(found) {
	case 0:
		return Key{}, fmt.Errorf("no API key has the name or id %q: see 'msb server key list': %w", abbreviate(ref), errdefs.ErrNotFound)
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
	return Key{}, fmt.Errorf("%q is ambiguous, it may be any of the API keys %s: use the id, or more of it: %w",
		abbreviate(ref), strings.Join(ids, ", "), errdefs.ErrInvalidArgument)
}

// nameHolders returns the keys that a name belongs to. There is at most one, unless the disk failed: a key whose
// making was called off, and whose name was given away, may be found made after a restart. The caller holds
// keySet.mu.
func (ks *keySet) nameHolders(name string, now time.Time) (holders []*key) {
	for _, k := range ks.byName[name] {
		if k.holdsName(now) {
			holders = append(holders, k)
		}
	}
	return holders
}

// holdsName reports whether no other key may have this one's name.
func (r Record) holdsName(now time.Time) bool {
	return r.Name != "" && r.StateAt(now) == Live && r.ReplacedBy == ""
}

// reserve keeps a name, which may be empty, for a key that is being made, until release.
func (ks *keySet) reserve(name string) error {
	if name == "" {
		return nil
	}
	now := ks.clock.time()
	ks.mu.Lock()
	defer ks.mu.Unlock()
	if holders := ks.nameHolders(name, now); len(holders) > 0 {
		return fmt.Errorf("API key %s has the name %q: choose another one, or revoke or rotate that key: %w",
			holders[0].ID, name, errdefs.ErrAlreadyExists)
	}
	if _, ok := ks.reserved[name]; ok {
		return fmt.Errorf("another API key with the name %q is being made at this moment: choose another one: %w",
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
