package keys

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/audit"
)

// RotateRequest says which key to replace.
type RotateRequest struct {
	// Ref is as Find takes it.
	Ref string
	// Grace is how long the old key is still accepted, as ParseExpiry takes it; empty means not at all.
	Grace string
	// Expire is the new key's; empty means that the new key lives as long as the old one was to.
	Expire string
	By     uint32
}

// Rotate makes a key like the one that is named, which goes when its grace period is over. Only a live
// key that was not rotated before can be: else errdefs.ErrFailedPrecondition.
func (i *Issuer) Rotate(ctx context.Context, req RotateRequest) (secret Secret, made Record, old Key, err error) {
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
	end, err := ParseExpiry(req.Grace, now)
	if err != nil {
		return fail(fmt.Errorf("grace period: %w", err))
	}
	if end.IsZero() {
		end = now
	}
	life := req.Expire
	if life == "" {
		life = old.life()
	}
	secret, made, err = i.draft(Record{
		Name: old.Name, Namespaces: old.Namespaces, Scopes: old.Scopes, Life: life, CreatedBy: req.By,
	})
	if err != nil {
		return fail(err)
	}
	old.RevokedAt, old.Revocation, old.ReplacedBy = end, ByRotation, made.ID
	err = i.commit(Change{
		Put:    []Record{made, old.Record},
		Events: []audit.Event{createEvent(made), rotateEvent(old.Record, req.By)},
	})
	if err != nil {
		return fail(fmt.Errorf("rotate key %s: %w", old.ID, err))
	}
	return secret, made, old, nil
}

func (r Record) rotatable(now time.Time) error {
	switch state := r.StateAt(now); {
	case r.ReplacedBy != "":
		return fmt.Errorf("API key %s was rotated already: rotate the one that replaced it, %s: %w", r.ID, r.ReplacedBy, errdefs.ErrFailedPrecondition)
	case state == Revoked:
		return fmt.Errorf("API key %s is revoked: make a new one with 'msb server keygen': %w", r.ID, errdefs.ErrFailedPrecondition)
	case state == Expired:
		return fmt.Errorf("API key %s has expired: make a new one with 'msb server keygen': %w", r.ID, errdefs.ErrFailedPrecondition)
	default:
		return nil
	}
}

// life is the key's Life; of one that was made before Life was kept, its duration.
func (r Record) life() string {
	if r.Life != "" || r.ExpiresAt.IsZero() {
		return r.Life
	}
	return fmt.Sprintf("%ds", r.ExpiresAt.Unix()-r.CreatedAt.Unix())
}
