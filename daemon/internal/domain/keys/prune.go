package keys

import (
	"context"
	"fmt"
)

// Prune removes the keys that have been expired or revoked for at least deadFor, and returns them. deadFor, such as
// 30d, has the format of ParseAge; if it is empty, Prune removes all expired and revoked keys. With dryRun, Prune
// only returns the keys. The error for an invalid deadFor is errdefs.ErrInvalidArgument.
//
// If a revoked key is used after it was pruned, this looks as if somebody had stolen the signing key. See
// audit.KeySuspect. If a backup from before the revocation is restored after the prune, the key is live again.
func (i *Issuer) Prune(ctx context.Context, deadFor string, dryRun bool, by uint32) ([]Key, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	at, err := ParseAge(deadFor, i.clock.time())
	if err != nil {
		return nil, err
	}
	dead := i.keys.deadSince(at)
	if dryRun || len(dead) == 0 {
		return dead, nil
	}
	var c Change
	for _, k := range dead {
		c.Delete = append(c.Delete, k.ID)
		c.Events = append(c.Events, pruneEvent(k.Record, by))
	}
	if err := i.commit(c); err != nil {
		return nil, fmt.Errorf("prune keys: %w", err)
	}
	return dead, nil
}
