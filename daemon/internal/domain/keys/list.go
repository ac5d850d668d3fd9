package keys

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/name"
)

// Filter chooses keys. The zero Filter takes all.
type Filter struct {
	// Namespace chooses keys that may act in it.
	Namespace string
	// UnusedFor, such as 90d, chooses keys that were not used for so long. A key that was never used
	// counts from its creation.
	UnusedFor string
	// State chooses keys in it.
	State State
}

// defaultPage is how many keys List returns if it is not told.
const defaultPage = 1000

// List returns keys, the oldest first: at most limit of them (0: 1000), from where an earlier call left
// off with next. An empty after begins; next is empty at the end. A bad filter or after is
// errdefs.ErrInvalidArgument.
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

// page returns up to limit keys that match and lie behind a position, and whether there are more.
func (ks *keySet) page(start position, limit int, matches func(*key) bool) (page []Key, more bool) {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	start.id += "\x00" // the next position there is
	for _, k := range ks.oldest[ks.search(start):] {
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

// compile checks the filter and makes it a function.
func (f Filter) compile(now time.Time) (func(*key) bool, error) {
	if f.Namespace != "" {
		if err := name.Validate("namespace", f.Namespace); err != nil {
			return nil, err
		}
	}
	if f.State < 0 || f.State > Revoked {
		return nil, fmt.Errorf("unknown key state %d: %w", f.State, errdefs.ErrInvalidArgument)
	}
	unusedSince, err := ParseAge(f.UnusedFor, now)
	if err != nil {
		return nil, err
	}
	return func(k *key) bool {
		return (f.Namespace == "" || len(k.Namespaces) == 0 || slices.Contains(k.Namespaces, f.Namespace)) &&
			(f.State == 0 || k.StateAt(now) == f.State) &&
			(f.UnusedFor == "" || !k.lastUsed().After(unusedSince))
	}, nil
}

// lastUsed is when the key was used or, if it never was, made.
func (k *key) lastUsed() time.Time {
	if at := k.usage.load().LastUsedAt; !at.IsZero() {
		return at
	}
	return k.CreatedAt
}

// String is what parsePosition takes. Ids are in it so that keys made in the same millisecond differ,
// and times so that it stays good when its key is pruned.
func (p position) String() string { return strconv.FormatInt(p.createdAt, 10) + "-" + p.id }

// parsePosition reads a position; of the empty text, one before all keys.
func parsePosition(s string) (position, error) {
	if s == "" {
		return position{createdAt: -1 << 63}, nil
	}
	at := strings.LastIndexByte(s, '-')
	if at > 0 {
		if createdAt, err := strconv.ParseInt(s[:at], 10, 64); err == nil {
			return position{createdAt, s[at+1:]}, nil
		}
	}
	return position{}, fmt.Errorf("%q is not where a page of API keys ended: begin with an empty one: %w",
		abbreviate(s), errdefs.ErrInvalidArgument)
}
