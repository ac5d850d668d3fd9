package keys

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/audit"
)

// RotateRequest describes the key to replace.
type RotateRequest struct {
	// Ref identifies the key to replace. See Find.
	Ref string
	// Grace is how long the old key is still accepted, in the format of ParseExpiry. Empty means not at all.
	Grace string
	// Expire is how long the new key is valid, in the format of ParseExpiry. Empty means as long as was requested
	// for the old key.
	Expire string
	// By is the uid of the local user who rotates the key.
	By uint32
}

// Rotate creates a key with the name and the limits of an existing key, which is refused when its grace period ends.
// The error is errdefs.ErrFailedPrecondition if the existing key is not live or was already rotated.
func (i *Issuer) Rotate(ctx context.Context, req RotateRequest) (secret Secret, created Record, old Key, err error) {
	fail := func(err error) (Secret, Record, Key, error) { return Secret{}, Record{}, Key{}, err }
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	if old, err = i.keys.find(req.Ref); err != nil {
		return fail(err)
	}
	now := i.clock.time()
	if err := old.rotatable(now); err != nil {
		return fail(err)
	}
	graceEnd := i.clock.latest()
	if req.Grace != "" {
		if graceEnd, err = parseSpan(graceSpan, req.Grace, graceEnd); err != nil {
			return fail(err)
		}
	}
	life := req.Expire
	if life == "" {
		life = old.life()
	}
	secret, created, err = i.draft(Record{
		Name: old.Name, Namespaces: old.Namespaces, Scopes: old.Scopes, Life: life, CreatedBy: req.By,
	})
	if err != nil {
		return fail(err)
	}
	old.RevokedAt, old.Revocation, old.ReplacedBy = graceEnd, ByRotation, created.ID
	err = i.commit(Change{
		Put:    []Record{created, old.Record},
		Clock:  created.CreatedAt,
		Events: []audit.Event{createEvent(created), rotateEvent(old.Record, req.By)},
	})
	if err != nil {
		return fail(fmt.Errorf("rotate key %s: %w", old.ID, err))
	}
	return secret, created, old, nil
}

// rotatable returns an error if the key cannot be rotated.
func (r Record) rotatable(now time.Time) error {
	switch state := r.StateAt(now); {
	case r.ReplacedBy != "":
		return fmt.Errorf("API key %s was already rotated: rotate the one that replaced it, %s: %w", r.ID, r.ReplacedBy, errdefs.ErrFailedPrecondition)
	case state == Revoked:
		return fmt.Errorf("API key %s is revoked: create a new one with 'msb server keygen': %w", r.ID, errdefs.ErrFailedPrecondition)
	case state == Expired:
		return fmt.Errorf("API key %s has expired: create a new one with 'msb server keygen': %w", r.ID, errdefs.ErrFailedPrecondition)
	default:
		return nil
	}
}

// life returns the key's Life. For a key that was created before Life was stored, it returns the time from the
// key's creation to its expiry.
func (r Record) life() string {
	if r.Life != "" || r.ExpiresAt.IsZero() {
		return r.Life
	}
	return fmt.Sprintf("%ds", r.ExpiresAt.Unix()-r.CreatedAt.Unix())
}
