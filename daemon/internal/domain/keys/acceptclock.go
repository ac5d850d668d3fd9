package keys

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/msbd/msbd/api/audit"
)

// ClockChange is what AcceptClock changes.
type ClockChange struct {
	// From is the time that the server used, and To is the time of the wall clock. They are equal if the server already
	// used that time.
	From, To time.Time
	// Revived is how many expired keys are valid again, and Expired is how many live keys have expired.
	Revived, Expired int
	// Revoked is how many keys are revoked, because they were created after To and would be valid for too long.
	Revoked int
}

// AcceptClock makes the server use the time of the wall clock, although it has used a later time before or still waits
// whether the wall clock stays ahead. Keys that were revoked remain so. With dryRun, AcceptClock only returns what it
// would change.
func (i *Issuer) AcceptClock(ctx context.Context, dryRun bool, by uint32) (ClockChange, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.saving.Lock()
	defer i.saving.Unlock()
	if err := ctx.Err(); err != nil {
		return ClockChange{}, err
	}
	c := ClockChange{From: i.clock.time(), To: i.clock.wall()}
	if c.From.Sub(c.To).Abs() < time.Second {
		c.From = c.To
		return c, nil
	}
	put, revoked := c.apply(append(i.keys.records(), i.keys.tombstones()...))
	if dryRun {
		return c, nil
	}
	events := []audit.Event{{Action: audit.ClockAccept, Actor: audit.ActorUID(by), Detail: map[string]string{
		"from": c.From.Format(time.RFC3339), "to": c.To.Format(time.RFC3339),
		"revived": strconv.Itoa(c.Revived), "expired": strconv.Itoa(c.Expired),
	}}}
	for _, r := range revoked {
		events = append(events, revokeEvent(r, by))
	}
	if err := i.store.CommitKeys(Change{Put: put, Clock: c.To, Events: events}); err != nil {
		return ClockChange{}, fmt.Errorf("store the accepted time (nothing was changed): %w", err)
	}
	i.keys.put(put...)
	i.clock.accept()
	i.keys.refreshAll()
	i.log.Warn("the time of the host's clock was accepted", "from", c.From, "to", c.To,
		"revived", c.Revived, "expired", c.Expired, "revoked", c.Revoked)
	return c, nil
}

// apply sets the counts of c. records include tombstones. It returns the records that change, and those of them that it revokes.
func (c *ClockChange) apply(records []Record) (put, revoked []Record) {
	createdAt := make(map[string]time.Time, len(records))
	names := make(map[string]bool)
	for _, r := range records {
		createdAt[r.ID] = r.CreatedAt
		if r.holdsName(c.From) {
			names[r.Name] = true
		}
	}
	for _, r := range records {
		before := r.StateAt(c.From)
		changed := false
		switch {
		case before == Revoked, r.Revocation == Pruned:
			if changed = r.RevokedAt.After(c.To); changed {
				r.RevokedAt = c.To
			}
		case r.CreatedAt.After(c.To) && !r.ExpiresAt.IsZero():
			r.RevokedAt, r.Revocation = c.To, ByHand
			revoked = append(revoked, r)
			c.Revoked++
			changed = true
		case createdAt[r.ReplacedBy].After(c.To):
			// Its grace period began at a time that was wrong.
			r.RevokedAt = r.RevokedAt.Add(c.To.Sub(c.From))
			changed = true
		}
		after := r.StateAt(c.To)
		switch {
		case before == Expired && after == Live:
			c.Revived++
			// Another key may have been given the name in the meantime.
			if r.holdsName(c.To) && names[r.Name] {
				r.Name = ""
				changed = true
			}
			names[r.Name] = true
		case before == Live && after == Expired:
			c.Expired++
		}
		if changed {
			put = append(put, r)
		}
	}
	return put, revoked
}
