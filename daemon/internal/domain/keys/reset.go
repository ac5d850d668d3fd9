package keys

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

// Reset replaces the signing key and returns how many live keys this invalidated. Once the new signing key is on disk,
// all keys issued before are refused, even if the server crashes before Reset has returned. If only a later step
// fails, Reset returns both the count and an error. As no remaining key depends on the latest time that the server has
// used, Reset discards that time and uses the wall clock again, even if it is behind.
func (i *Issuer) Reset(ctx context.Context, by uint32) (invalidated int, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.saving.Lock()
	defer i.saving.Unlock()
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	at := i.clock.wall()
	ring, err := newKeyring(i.keyring.Load().instanceID, at)
	if err != nil {
		return 0, err
	}
	actor := audit.ActorUID(by)
	// Replace the keyring before the records. If the server crashes in between, no signing key verifies the old
	// keys anymore. If the new keyring is in place, but perhaps not durable, use it nevertheless, because the next
	// start would load it and refuse the keys of the old one.
	saveErr := replaceKeyring(i.store, i.path, ring, signingKeyEvent(audit.SigningReset, actor, ring))
	if saveErr != nil && !errors.Is(saveErr, durable.ErrNotDurable) {
		return 0, saveErr
	}
	marked, forgotten, invalidated := i.adopt(ring, at)
	i.clock.accept()
	i.log.Warn("the signing key was replaced: every earlier API key is invalid now",
		"count", invalidated, "signing_key_id", ring.keyID)
	c := Change{Delete: forgotten, Put: marked, Clock: at}
	if invalidated > 0 {
		c.Events = []audit.Event{invalidateEvent(actor, ring, invalidated)}
	}
	if err = i.store.CommitKeys(c); err != nil {
		err = fmt.Errorf("mark earlier API keys as revoked (they are already refused): %w", err)
	}
	return invalidated, errors.Join(saveErr, err)
}

// adopt starts to use ring, which is already on disk. From now on, the keys of other signing keys are refused. adopt
// returns their records, marked as revoked at the time at, for the caller to store, and the ids of the tombstones of
// their pruned keys, for the caller to delete. live is how many of these keys were live.
func (i *Issuer) adopt(ring *keyring, at time.Time) (marked []Record, forgotten []string, live int) {
	now := i.clock.time()
	i.keyring.Store(ring)
	i.keys.trust(ring.identity)
	for _, r := range i.keys.records() {
		if r.SigningKeyID == ring.keyID || r.StateAt(at) == Revoked {
			continue
		}
		if r.StateAt(now) == Live {
			live++
		}
		marked = append(marked, r.invalidated(at))
	}
	i.keys.put(marked...)
	for _, r := range i.keys.tombstones() {
		if r.SigningKeyID != ring.keyID {
			forgotten = append(forgotten, r.ID)
		}
	}
	i.keys.remove(forgotten...)
	return marked, forgotten, live
}

// invalidated returns the record as it is after its signing key was replaced at the time at. It keeps a Revocation that
// is already set, such as that of a rotation with a grace period, because Restore undoes only ByReset.
func (r Record) invalidated(at time.Time) Record {
	r.RevokedAt = at
	if r.Revocation == "" {
		r.Revocation = ByReset
	}
	return r
}

// replaceKeyring writes e to the audit log and then ring to disk. If e cannot be logged, ring is not written. If the
// error is durable.ErrNotDurable, ring is in place; after any other error it is not.
func replaceKeyring(store Store, path string, ring *keyring, e audit.Event) error {
	if err := store.CommitKeys(Change{Events: []audit.Event{e}}); err != nil {
		return fmt.Errorf("write audit log (nothing was changed): %w", err)
	}
	err := ring.save(path)
	if err != nil && !errors.Is(err, durable.ErrNotDurable) {
		e.Detail = map[string]string{"failed": "the keyring could not be written; nothing was changed"}
		err = errors.Join(err, store.CommitKeys(Change{Events: []audit.Event{e}}))
	}
	return err
}
