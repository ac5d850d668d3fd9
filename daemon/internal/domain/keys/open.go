package keys

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/audit"
)

// Options is what Open needs.
type Options struct {
	// KeyringPath is the file of the signing key. Its directory is made, or must be, private to the
	// user who runs msbd.
	KeyringPath string
	Store       Store
	// Reset replaces the signing key before anything else, also when the keyring is damaged.
	Reset bool
	Log   *slog.Logger

	// readClock is what tests have in place of systemClock.
	readClock func() (wall, steady int64)
}

// Open loads the keyring and every record. The first start makes a keyring; a keyring that is gone
// although there are live keys, or that is damaged, is an error, never silently replaced. Records of
// other signing keys are marked revoked: that ends a reset which a crash cut short.
func Open(opts Options) (*Issuer, *Verifier, error) {
	if opts.readClock == nil {
		opts.readClock = systemClock()
	}
	c := newClock(opts.readClock)
	saved, err := opts.Store.LoadKeys()
	if err != nil {
		return nil, nil, fmt.Errorf("load API keys: %w", err)
	}
	ring, err := openKeyring(opts, saved.Records, c.wall())
	if err != nil {
		return nil, nil, err
	}
	i := &Issuer{
		path: opts.KeyringPath, store: opts.Store, clock: c, keys: newKeySet(c, ring.identity), suspects: newSuspects(), log: opts.Log,
	}
	i.keys.load(saved)

	// The latest time protects the expiry of this signing key's keys. If there are none, it may be one
	// that a reset was to set right.
	var change Change
	if latest, ok := latestTime(saved.Records, ring.keyID); ok {
		c.advance(latest)
		c.advance(saved.Latest)
	} else if saved.Latest.After(c.time()) {
		change.Clock = c.time()
	}
	marked, live := i.adopt(ring, c.time())
	if len(marked) > 0 {
		i.log.Warn("API keys of earlier signing keys are invalid from now on", "count", live, "signing_key_id", ring.keyID)
		change.Put = marked
		change.Events = []audit.Event{invalidateEvent(audit.ActorServer, ring, live)}
	}
	if len(marked) > 0 || !change.Clock.IsZero() {
		if err := opts.Store.CommitKeys(change); err != nil {
			return nil, nil, fmt.Errorf("record that earlier API keys are revoked: %w", err)
		}
	}
	return i, &Verifier{keys: i.keys, clock: c, suspects: i.suspects}, nil
}

func openKeyring(opts Options, records []Record, now time.Time) (*keyring, error) {
	ring, err := loadKeyring(opts.KeyringPath)
	absent := errors.Is(err, fs.ErrNotExist)
	switch {
	case opts.Reset && (err == nil || absent || errdefs.IsDataLoss(err)):
		var instanceID string
		if err == nil {
			instanceID = ring.instanceID
		}
		if ring, err = newKeyring(instanceID, now); err != nil {
			return nil, err
		}
		return ring, replaceKeyring(opts.Store, opts.KeyringPath, ring, signingKeyEvent(audit.SigningReset, audit.ActorServer, ring))
	case absent:
		for _, r := range records {
			if r.StateAt(now) != Revoked {
				return nil, fmt.Errorf("keyring %s is gone, but there are API keys that it signed: put it back from a "+
					"backup, or start with --reset-key, which makes a new one and invalidates every API key: %w",
					opts.KeyringPath, errdefs.ErrDataLoss)
			}
		}
		if ring, err = newKeyring("", now); err != nil {
			return nil, err
		}
		return ring, ring.save(opts.KeyringPath)
	default:
		return ring, err
	}
}

// latestTime is the latest time at which something happened to a signing key's keys; ok reports whether it
// has any. The end of a grace period may lie in the future, and the key that replaced the old one has
// the time of the rotation.
func latestTime(records []Record, signingKeyID string) (latest time.Time, ok bool) {
	for _, r := range records {
		if r.SigningKeyID != signingKeyID {
			continue
		}
		ok = true
		if r.CreatedAt.After(latest) {
			latest = r.CreatedAt
		}
		if r.Revocation != ByRotation && r.RevokedAt.After(latest) {
			latest = r.RevokedAt
		}
	}
	return latest, ok
}
