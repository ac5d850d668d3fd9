package keys

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/name"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// Filter selects keys. A key must match all fields that are set. The zero Filter selects all keys.
type Filter struct {
	// Namespace selects keys that have access to this tenant namespace.
	Namespace string
	// UnusedFor, such as 90d, selects keys that have not been used for that long. For a key that has never been
	// used, the time since its creation counts. ParseAge describes the format.
	UnusedFor string
	// State selects keys in this state.
	State State
}

// defaultPage is the number of keys that List returns if limit is 0.
const defaultPage = 1000

// List returns the keys that f selects, oldest first, but at most limit of them. If limit is 0, it is 1000. next is
// empty if there are no more keys. Otherwise, pass it as after to get the following keys; after is empty in the
// first call. The error for an invalid filter or after is errdefs.ErrInvalidArgument.
func (i *Issuer) List(f Filter, after string, limit int) (keys []Key, next string, err error) {
	matches, err := f.compile(i.clock.time())
	if err != nil {
		return nil, "", err
	}
	start, err := parsePosition(after)
	if err != nil {
		return nil, "", err
	}
	if limit <= 0 {
		limit = defaultPage
	}
	keys, more := i.keys.page(start, limit, matches)
	if more {
		last := key{Record: keys[len(keys)-1].Record}
		next = last.position().String()
	}
	return keys, next, nil
}

// page returns up to limit matching keys that come after the position start. more reports whether there are others.
func (ks *keySet) page(start position, limit int, matches func(*key) bool) (page []Key, more bool) {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	start.id += "\x00" // the smallest position after start
	for _, k := range ks.byAge[ks.search(start):] {
		if !matches(k) {
			continue
		}
		if len(page) == limit {
			return page, true
		}
		page = append(page, k.snapshot())
	}
	return page, false
}

// compile checks the filter and returns a function that reports whether the filter selects a key.
func (f Filter) compile(now time.Time) (func(*key) bool, error) {
	if f.Namespace != "" {
		if err := name.Validate("namespace", f.Namespace); err != nil {
			return nil, err
		}
	}
	if f.State < 0 || f.State > Revoked {
		return nil, fmt.Errorf("unknown key state %d: %w", f.State, errdefs.ErrInvalidArgument)
	}
	unusedSince, err := ParseAge("unused-for", f.UnusedFor, now)
	if err != nil {
		return nil, err
	}
	return func(k *key) bool {
		return (f.Namespace == "" || len(k.Namespaces) == 0 || slices.Contains(k.Namespaces, f.Namespace)) &&
			(f.State == 0 || k.StateAt(now) == f.State) &&
			(f.UnusedFor == "" || !k.lastUsed().After(unusedSince))
	}, nil
}

// lastUsed returns when the key was last used, or when it was created if it has never been used.
func (k *key) lastUsed() time.Time {
	if at := k.usage.load().LastUsedAt; !at.IsZero() {
		return at
	}
	return k.CreatedAt
}

// String encodes the position for parsePosition. The id distinguishes keys that were created in the same
// millisecond. The time keeps the position valid when its key has been pruned.
func (p position) String() string { return strconv.FormatInt(p.createdAt, 10) + "-" + p.id }

// parsePosition decodes a position. For the empty string, it returns a position before all keys.
func parsePosition(s string) (position, error) {
	if s == "" {
		return position{createdAt: -1 << 63}, nil
	}
	dash := strings.LastIndexByte(s, '-')
	if dash > 0 {
		if createdAt, err := strconv.ParseInt(s[:dash], 10, 64); err == nil {
			return position{createdAt, s[dash+1:]}, nil
		}
	}
	return position{}, fmt.Errorf("invalid page token %q: use the token that the previous page returned, or an empty token for the first page: %w",
		bounded.Short(s), errdefs.ErrInvalidArgument)
}
