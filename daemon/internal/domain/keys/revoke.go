package keys

import (
	"context"
	"fmt"

	"github.com/msbd/msbd/api/audit"
)

// Revoke refuses a key, for good, from before it returns, and ends what it has in progress. A key that
// is revoked already stays as it is, which is no error; but what a reset did, which Restore can undo,
// becomes final. For ref see Find.
func (i *Issuer) Revoke(ctx context.Context, ref string, by uint32) (Key, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return Key{}, err
	}
	k, err := i.keys.find(ref)
	if err != nil {
		return Key{}, err
	}
	now := i.clock.time()
	switch {
	case k.StateAt(now) != Revoked:
		k.RevokedAt = now
	case k.Revocation != ByReset:
		return k, nil
	}
	k.Revocation = ByHand
	if err := i.commit(Change{Put: []Record{k.Record}, Events: []audit.Event{revokeEvent(k.Record, by)}}); err != nil {
		return Key{}, fmt.Errorf("revoke key %s: %w", k.ID, err)
	}
	return k, nil
}
