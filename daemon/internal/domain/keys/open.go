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

// Options are the parameters of Open.
type Options struct {
	// KeyringPath is the path of the keyring, the file that holds the signing key. If its directory does not
	// exist, Open creates it. Otherwise the directory must be accessible only to the user who runs msbd.
	KeyringPath string
	Store       Store
	// Reset replaces the signing key before anything else is done, even if the keyring is damaged.
	Reset bool
	Log   *slog.Logger

	// readClock and asleep replace systemClock and systemSleep in tests.
	readClock func() (wall, steady int64)
	asleep    func() int64
}

// Open loads the keyring and all records. It creates a keyring if there is none and no key depends on one. It
// returns an error, and does not replace the keyring, if the keyring is missing although there are keys that are
// not revoked, or if it is damaged. Open marks the records of other signing keys as revoked, which completes a reset
// that was interrupted by a crash.
func Open(opts Options) (*Issuer, *Verifier, error) {
	if opts.readClock == nil {
		opts.readClock = systemClock()
	}
	if opts.asleep == nil {
		opts.asleep = systemSleep
	}
	c := newClock(opts.readClock, opts.asleep)
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

	// The latest known time keeps expired keys of this signing key from becoming valid again. If this signing key
	// has no keys, do not rely on that time: it may be a wrong one that an interrupted reset did not get to clear.
	var change Change
	if latest, ok := latestTime(saved.Records, ring.keyID); ok {
		if !saved.Latest.IsZero() { // zero after an upgrade from schema 1
			latest = saved.Latest
		}
		c.advance(latest)
	} else if saved.Latest.After(c.time()) {
		change.Clock = c.time()
	}
	marked, forgotten, live := i.adopt(ring, c.time())
	change.Delete = forgotten
	if len(marked) > 0 {
		i.log.Warn("the API keys of earlier signing keys are invalid now", "count", live, "signing_key_id", ring.keyID)
		change.Put = marked
		change.Events = []audit.Event{invalidateEvent(audit.ActorServer, ring, live)}
	}
	if len(marked) > 0 || len(forgotten) > 0 || !change.Clock.IsZero() {
		if err := opts.Store.CommitKeys(change); err != nil {
			return nil, nil, fmt.Errorf("mark the API keys of earlier signing keys as revoked: %w", err)
		}
	}
	return i, &Verifier{keys: i.keys, clock: c, suspects: i.suspects, checkSignature: verifySignature}, nil
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
				return nil, fmt.Errorf("keyring %s is missing, but there are API keys that it signed: restore it from a "+
					"backup, or start with --reset-key, which creates a new signing key and invalidates every API key: %w",
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

// latestTime returns the latest time at which a key of a signing key was created or revoked. ok reports whether
// the signing key has any keys. The time of a rotation is the creation time of the new key: the RevokedAt of the
// rotated key may be in the future, because it is the end of the grace period. The RevokedAt of a tombstone does not
// count, because the key is refused at any time.
func latestTime(records []Record, signingKeyID string) (latest time.Time, ok bool) {
	for _, r := range records {
		if r.SigningKeyID != signingKeyID {
			continue
		}
		ok = true
		if r.CreatedAt.After(latest) {
			latest = r.CreatedAt
		}
		if r.Revocation != ByRotation && r.Revocation != Pruned && r.RevokedAt.After(latest) {
			latest = r.RevokedAt
		}
	}
	return latest, ok
}
