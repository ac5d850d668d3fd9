package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

// Snapshot calls take with the contents of the keyring file. While take runs, no key can be created or changed and the
// signing key cannot be replaced, so take should return quickly.
func (i *Issuer) Snapshot(take func(keyring Secret) error) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	data, err := i.keyring.Load().encode()
	if err != nil {
		return err
	}
	return take(data)
}

// Restored is the result of restoring a backup.
type Restored struct {
	// TakenAt is when the backup was taken.
	TakenAt time.Time
	// Live is how many keys from the backup are live now. Invalidated is how many keys were live before the
	// restore and are refused now.
	Live, Invalidated int
}

// Restore restores the keys and the signing key from a backup. keyring is what Snapshot passed to take, and records
// are the records that the store held at that time.
//
// Keys that were created since the backup remain if the backup's signing key signed them. Keys of other signing keys
// are refused, as after a reset. A key is revoked if it is revoked either in the backup or on this server. The exception
// is a revocation by a reset: Restore undoes it if it brings back the signing key that the reset replaced. A key that was
// revoked and pruned remains refused while its tombstone exists. If two live keys have the same name, the one from the
// backup keeps it.
//
// Restore returns how many keys from the backup are live now, and how many keys were live before and are refused now.
// If the backup is damaged, the error is errdefs.ErrDataLoss and nothing is changed. After a crash at any point, the
// accepted keys are either the old ones, the restored ones, or fewer. Calling Restore again then completes it.
func (i *Issuer) Restore(ctx context.Context, keyring Secret, records []Record, by uint32) (live, invalidated int, err error) {
	ring, err := decodeKeyring([]byte(keyring.Reveal()))
	if err != nil {
		return 0, 0, fmt.Errorf("read the keyring in the backup: %w", err)
	}
	if err := checkRecords(records); err != nil {
		return 0, 0, fmt.Errorf("read the keys in the backup: %w", err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return 0, 0, err
	}
	now := i.clock.time()
	before := append(i.keys.records(), i.keys.tombstones()...)
	after := mergeRecords(before, records, ring.keyID, now)
	live, invalidated = countRestored(before, records, after, now)

	actor := audit.ActorUID(by)
	e := signingKeyEvent(audit.ServerRestore, actor, ring)
	e.Detail = map[string]string{"keys": strconv.Itoa(len(records))}
	// As in Reset, replace the keyring before the records.
	saveErr := replaceKeyring(i.store, i.path, ring, e)
	if saveErr != nil && !errors.Is(saveErr, durable.ErrNotDurable) {
		return 0, 0, saveErr
	}
	_, forgotten, _ := i.adopt(ring, now)
	if latest, ok := latestTime(newTimes(before, after), ring.keyID); ok {
		i.clock.advance(latest)
	}
	c := Change{Delete: forgotten, Put: after}
	if invalidated > 0 {
		c.Events = []audit.Event{invalidateEvent(actor, ring, invalidated)}
	}
	if err = i.commit(c); err != nil {
		return 0, invalidated, errors.Join(saveErr, fmt.Errorf(
			"the backup's signing key is in use, but its API keys could not be stored: restore the backup again: %w", err))
	}
	i.log.Warn("API keys were restored from a backup", "live", live, "invalidated", invalidated, "signing_key_id", ring.keyID)
	return live, invalidated, saveErr
}

// newTimes returns the records in after, but without the creation times of those keys that are also in before. The server
// has used these times. If it uses an earlier time now, an administrator has accepted that one.
func newTimes(before, after []Record) []Record {
	known := make(map[string]bool, len(before))
	for _, r := range before {
		known[r.ID] = true
	}
	after = slices.Clone(after)
	for n, r := range after {
		if known[r.ID] {
			after[n].CreatedAt = time.Time{}
		}
	}
	return after
}

// checkRecords returns an error if records contains a record that no store can have held, or the same id twice.
func checkRecords(records []Record) error {
	seen := make(map[string]bool, len(records))
	for _, r := range records {
		if !isID(r.ID) || seen[r.ID] || r.SigningKeyID == "" || r.CreatedAt.IsZero() {
			return fmt.Errorf("record %q is damaged: %w", bounded.Short(r.ID), errdefs.ErrDataLoss)
		}
		seen[r.ID] = true
	}
	return nil
}

// mergeRecords merges the current records with those from a backup. signingKeyID identifies the signing key in the
// backup, which is the only one whose keys are accepted after the restore.
func mergeRecords(current, backup []Record, signingKeyID string, now time.Time) []Record {
	records := make([]Record, 0, len(backup))
	indexByID := make(map[string]int, len(backup))
	for n, r := range backup {
		indexByID[r.ID] = n
		records = append(records, r.withoutReset(signingKeyID))
	}
	for _, r := range current {
		r = r.withoutReset(signingKeyID)
		if n, ok := indexByID[r.ID]; ok {
			records[n] = r.withRevocationOf(records[n])
		} else {
			records = append(records, r)
		}
	}
	records = slices.DeleteFunc(records, func(r Record) bool { return r.Revocation == Pruned && r.SigningKeyID != signingKeyID })
	names := make(map[string]bool)
	for n, r := range records {
		if r.Revocation == Pruned {
			records[n] = r.tombstone(r.RevokedAt)
			continue
		}
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

// withoutReset returns the record without a revocation by a reset, if signingKeyID is its signing key.
func (r Record) withoutReset(signingKeyID string) Record {
	if r.SigningKeyID == signingKeyID && r.Revocation == ByReset {
		r.RevokedAt, r.Revocation = time.Time{}, ""
	}
	return r
}

// withRevocationOf returns r with the earlier of its own revocation and that of other, which is another version of the
// same record. If one of them is a tombstone, so is the result. It also takes ReplacedBy from other if r has none.
func (r Record) withRevocationOf(other Record) Record {
	switch {
	case r.Revocation == Pruned, other.RevokedAt.IsZero():
	case other.Revocation == Pruned, r.RevokedAt.IsZero(), other.RevokedAt.Before(r.RevokedAt):
		r.RevokedAt, r.Revocation = other.RevokedAt, other.Revocation
	}
	if r.ReplacedBy == "" {
		r.ReplacedBy = other.ReplacedBy
	}
	return r
}

// countRestored returns how many keys in backup are live according to after, and how many keys are live according to
// before but not according to after.
func countRestored(before, backup, after []Record, now time.Time) (live, invalidated int) {
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
