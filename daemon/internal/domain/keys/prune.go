package keys

import (
	"context"
	"fmt"
)

// Prune removes keys that have been expired or revoked for so long (such as 30d; empty: any time), and
// returns what they were. With dryRun it only says. A bad deadFor is errdefs.ErrInvalidArgument.
//
// Who uses a revoked key after it was pruned looks like somebody who has the signing key: see
// audit.KeySuspect. And a Restore of a backup from before the key was revoked brings it back to life.
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
