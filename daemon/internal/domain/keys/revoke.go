package keys

import (
	"context"
	"fmt"

	"github.com/msbd/msbd/api/audit"
)

// Revoke permanently revokes the key that ref identifies. See Find for ref. When Revoke returns, the key is refused
// and the contexts of its requests are canceled. Revoking a key that is already revoked is not an error and changes
// nothing, with one exception: a revocation by a reset, which Restore can undo, becomes permanent.
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
