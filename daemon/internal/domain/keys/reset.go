package keys

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

// Reset replaces the signing key and returns how many live keys that invalidated. Every key issued
// before is refused from before it returns, also after a crash at any point of it. As no key is left that
// depends on it, a clock that is behind is believed from then on.
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
	// The keyring before the records: once it is replaced, a crash leaves only keys that nothing
	// verifies. One that was replaced counts from now on, however badly: the next start would refuse the
	// old one's keys.
	saved := replaceKeyring(i.store, i.path, ring, signingKeyEvent(audit.SigningReset, actor, ring))
	if saved != nil && !errors.Is(saved, durable.ErrNotDurable) {
		return 0, saved
	}
	marked, invalidated := i.adopt(ring, at)
	i.clock.set()
	i.log.Warn("the signing key was replaced: every earlier API key is invalid from now on",
		"count", invalidated, "signing_key_id", ring.keyID)
	c := Change{Put: marked, Clock: at}
	if invalidated > 0 {
		c.Events = []audit.Event{invalidateEvent(actor, ring, invalidated)}
	}
	if err = i.store.CommitKeys(c); err != nil {
		err = fmt.Errorf("record that earlier API keys are revoked (they are refused already): %w", err)
	}
	return invalidated, errors.Join(saved, err)
}

// adopt makes ring, which is on disk, the one that counts: the keys of every other are refused. It
// returns their records as they are to be stored, marked as refused from at on, and how many of them were
// live.
func (i *Issuer) adopt(ring *keyring, at time.Time) (marked []Record, live int) {
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
	return marked, live
}

// invalidated is the record once its signing key no longer counts. What else ended it, or was to, is kept:
// only ByReset can ever be undone.
func (r Record) invalidated(at time.Time) Record {
	r.RevokedAt = at
	if r.Revocation == "" {
		r.Revocation = ByReset
	}
	return r
}

// replaceKeyring writes e to the audit log and then ring to the disk: what cannot be logged is not done.
// durable.ErrNotDurable is the one error after which ring is in place.
func replaceKeyring(store Store, path string, ring *keyring, e audit.Event) error {
	if err := store.CommitKeys(Change{Events: []audit.Event{e}}); err != nil {
		return fmt.Errorf("write the audit log before anything is changed: %w", err)
	}
	err := ring.save(path)
	if err != nil && !errors.Is(err, durable.ErrNotDurable) {
		e.Detail = map[string]string{"failed": "the keyring could not be written; nothing was changed"}
		err = errors.Join(err, store.CommitKeys(Change{Events: []audit.Event{e}}))
	}
	return err
}
