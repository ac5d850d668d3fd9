package keys

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

// Snapshot calls take with the keyring file's content, while no key and no signing key changes: so take
// should not take long.
func (i *Issuer) Snapshot(take func(keyring Secret) error) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	data, err := i.keyring.Load().encode()
	if err != nil {
		return err
	}
	return take(data)
}

// Restored says what the restore of a backup did.
type Restored struct {
	// TakenAt is when the backup was made.
	TakenAt time.Time
	// Live is how many keys of the backup are live, Invalidated how many keys were live before and are
	// refused now.
	Live, Invalidated int
}

// Restore takes keys and a signing key from a backup: keyring is what Snapshot gave, records what the
// store held. Keys that were made since stay if the same signing key made them; those of another are
// refused, as after a reset. A key that either side knows as revoked is revoked; only a reset is undone,
// by bringing back the signing key that it replaced. Of two live keys with one name, that of the backup
// keeps it.
//
// It returns how many keys of the backup are live, and how many keys were live and are refused now. A
// damaged backup is errdefs.ErrDataLoss and changes nothing. A crash at any point leaves either the old
// keys or the new ones in force, or fewer; done again, it completes.
func (i *Issuer) Restore(ctx context.Context, keyring Secret, records []Record, by uint32) (live, invalidated int, err error) {
	ring, err := decodeKeyring([]byte(keyring.Reveal()))
	if err != nil {
		return 0, 0, fmt.Errorf("the keyring in the backup: %w", err)
	}
	if err := checkRecords(records); err != nil {
		return 0, 0, fmt.Errorf("the keys in the backup: %w", err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return 0, 0, err
	}
	now := i.clock.time()
	before := i.keys.records()
	after := restored(before, records, ring.keyID, now)
	live, invalidated = compare(before, records, after, now)

	actor := audit.ActorUID(by)
	e := signingKeyEvent(audit.ServerRestore, actor, ring)
	e.Detail = map[string]string{"keys": strconv.Itoa(len(records))}
	// The order of a reset, for the same reason.
	saved := replaceKeyring(i.store, i.path, ring, e)
	if saved != nil && !errors.Is(saved, durable.ErrNotDurable) {
		return 0, 0, saved
	}
	i.adopt(ring, now)
	if latest, ok := latestTime(after, ring.keyID); ok {
		i.clock.advance(latest)
	}
	c := Change{Put: after}
	if invalidated > 0 {
		c.Events = []audit.Event{invalidateEvent(actor, ring, invalidated)}
	}
	if err = i.commit(c); err != nil {
		return 0, invalidated, errors.Join(saved, fmt.Errorf(
			"the backup's signing key is in force, but its API keys cannot be stored: restore it again: %w", err))
	}
	i.log.Warn("API keys were restored from a backup", "live", live, "invalidated", invalidated, "signing_key_id", ring.keyID)
	return live, invalidated, saved
}

// checkRecords refuses what no store of this server held.
func checkRecords(records []Record) error {
	seen := make(map[string]bool, len(records))
	for _, r := range records {
		if !isID(r.ID) || seen[r.ID] || r.SigningKeyID == "" || r.CreatedAt.IsZero() {
			return fmt.Errorf("record %q is damaged: %w", abbreviate(r.ID), errdefs.ErrDataLoss)
		}
		seen[r.ID] = true
	}
	return nil
}

// restored is what becomes of the records at hand and of those of a backup when the signing key with
// signingKeyID is the one that counts from now on.
func restored(current, backup []Record, signingKeyID string, now time.Time) []Record {
	records := make([]Record, 0, len(backup))
	at := make(map[string]int, len(backup))
	for n, r := range backup {
		at[r.ID] = n
		records = append(records, r.withoutReset(signingKeyID))
	}
	for _, r := range current {
		r = r.withoutReset(signingKeyID)
		if n, ok := at[r.ID]; ok {
			records[n] = r.revokedAs(records[n])
		} else {
			records = append(records, r)
		}
	}
	names := make(map[string]bool)
	for n, r := range records {
		if r.SigningKeyID != signingKeyID && r.StateAt(now) != Revoked {
			r = r.invalidated(now)
		}
		if r.holdsName(now) && names[r.Name] {
			r.Name = ""
		}
		if r.holdsName(now) {
			names[r.Name] = true
		}
		records[n] = r
	}
	return records
}

// withoutReset is the record when its signing key may be back in force.
func (r Record) withoutReset(signingKeyID string) Record {
	if r.SigningKeyID == signingKeyID && r.Revocation == ByReset {
		r.RevokedAt, r.Revocation = time.Time{}, ""
	}
	return r
}

// revokedAs is the record with what another version of it knows of its end.
func (r Record) revokedAs(other Record) Record {
	if !other.RevokedAt.IsZero() && (r.RevokedAt.IsZero() || other.RevokedAt.Before(r.RevokedAt)) {
		r.RevokedAt, r.Revocation = other.RevokedAt, other.Revocation
	}
	if r.ReplacedBy == "" {
		r.ReplacedBy = other.ReplacedBy
	}
	return r
}

// compare counts the keys of the backup that are live after, and those that were live before and are not
// after.
func compare(before, backup, after []Record, now time.Time) (live, invalidated int) {
	liveAfter := make(map[string]bool, len(after))
	for _, r := range after {
		liveAfter[r.ID] = r.StateAt(now) == Live
	}
	for _, r := range backup {
		if liveAfter[r.ID] {
			live++
		}
	}
	for _, r := range before {
		if r.StateAt(now) == Live && !liveAfter[r.ID] {
			invalidated++
		}
	}
	return live, invalidated
}
