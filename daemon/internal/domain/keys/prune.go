package keys

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"
)

// maxTombstones is how many tombstones are kept. The oldest ones are dropped first.
const maxTombstones = 10_000

// tombstone returns what Prune leaves of the record of a revoked key. A client that still uses the key is then refused
// like with any other revoked key. Without it, the key would look as if somebody had stolen the signing key, because its
// signature is valid. A tombstone also keeps the restore of an old backup from making the key valid again.
func (r Record) tombstone(at time.Time) Record {
	return Record{ID: r.ID, CreatedAt: r.CreatedAt, ExpiresAt: r.ExpiresAt, SigningKeyID: r.SigningKeyID, RevokedAt: at, Revocation: Pruned}
}

// Prune removes the keys that have been expired or revoked for at least deadFor, and returns them. deadFor, such as
// 30d, has the format of ParseAge; if it is empty, Prune removes all expired and revoked keys. With dryRun, Prune
// only returns the keys. The error for an invalid deadFor is errdefs.ErrInvalidArgument.
//
// Of each revoked key, a tombstone remains until the key would have expired or the signing key is replaced, but only of
// the last maxTombstones. Older ones are treated like keys that this server has not issued. See audit.KeySuspect.
func (i *Issuer) Prune(ctx context.Context, deadFor string, dryRun bool, by uint32) ([]Key, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	now := i.clock.time()
	at, err := ParseAge("dead-for", deadFor, now)
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
		if k.SigningKeyID == i.keyring.Load().keyID && !reached(k.ExpiresAt, now) {
			c.Put = append(c.Put, k.tombstone(now))
		}
	}
	kept := i.keys.tombstones()
	slices.SortFunc(kept, func(a, b Record) int { return cmp.Or(b.RevokedAt.Compare(a.RevokedAt), cmp.Compare(a.ID, b.ID)) })
	room := max(0, maxTombstones-len(c.Put))
	for n, r := range kept {
		if n >= room || reached(r.ExpiresAt, now) {
			c.Delete = append(c.Delete, r.ID)
		}
	}
	c.Put = c.Put[max(0, len(c.Put)-maxTombstones):]
	if err := i.commit(c); err != nil {
		return nil, fmt.Errorf("prune keys: %w", err)
	}
	return dead, nil
}
