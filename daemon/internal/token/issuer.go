package token

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/sandbox"
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
}

// Issuer makes keys and replaces the signing key. It is safe for concurrent use.
type Issuer struct {
	path     string
	store    Store
	verifier *Verifier
	log      *slog.Logger

	// mu is held for reading while a key is issued, for writing while the keyring is replaced: no key
	// is acknowledged that a reset beside it invalidated.
	mu      sync.RWMutex
	keyring *keyring
}

// Open loads the keyring and every record. The first start makes a keyring; a keyring that is gone
// although there are live keys, or that is damaged, is an error, never silently replaced. Records of
// other signing keys are marked revoked: that ends a reset which a crash cut short.
func Open(opts Options) (*Issuer, *Verifier, error) {
	records, err := opts.Store.Keys()
	if err != nil {
		return nil, nil, fmt.Errorf("load API keys: %w", err)
	}
	ring, err := openKeyring(opts, records)
	if err != nil {
		return nil, nil, err
	}
	i := &Issuer{path: opts.KeyringPath, store: opts.Store, verifier: newVerifier(records), log: opts.Log}
	if _, err := i.adopt(ring); err != nil {
		return nil, nil, err
	}
	return i, i.verifier, nil
}

func openKeyring(opts Options, records []Record) (*keyring, error) {
	ring, err := loadKeyring(opts.KeyringPath)
	switch {
	case err == nil && !opts.Reset:
		return ring, nil
	case err == nil:
		ring, err = newKeyring(ring.instanceID, now())
	case opts.Reset && (errdefs.IsDataLoss(err) || errors.Is(err, fs.ErrNotExist)):
		ring, err = newKeyring("", now())
	case errors.Is(err, fs.ErrNotExist):
		for _, r := range records {
			if !r.Revoked() {
				return nil, fmt.Errorf("keyring %s is gone, but there are API keys that it signed: put it back from a "+
					"backup, or start with --reset-key, which makes a new one and invalidates every API key: %w",
					opts.KeyringPath, errdefs.ErrDataLoss)
			}
		}
		ring, err = newKeyring("", now())
	}
	if err != nil {
		return nil, err
	}
	return ring, ring.save(opts.KeyringPath)
}

// IssueRequest says what key to make.
type IssueRequest struct {
	// Expire is as ParseExpiry takes it; empty means never.
	Expire string
	// Namespace limits the key to one tenant namespace; empty means every one.
	Namespace string
	// CreatedBy is the uid of the local user who asks.
	CreatedBy uint32
}

// Issue makes a key. When it returns without an error the key is durable and Verify takes it. The
// Secret is the only copy. A bad request is errdefs.ErrInvalidArgument.
func (i *Issuer) Issue(ctx context.Context, req IssueRequest) (Secret, Record, error) {
	if req.Namespace != "" {
		if err := sandbox.ValidateName("namespace", req.Namespace); err != nil {
			return Secret{}, Record{}, err
		}
	}
	created := now()
	expires, err := ParseExpiry(req.Expire, created)
	if err != nil {
		return Secret{}, Record{}, err
	}
	i.mu.RLock()
	defer i.mu.RUnlock()
	if err := ctx.Err(); err != nil {
		return Secret{}, Record{}, err
	}
	r := Record{
		ID:           randomID(),
		Namespace:    req.Namespace,
		CreatedAt:    created,
		CreatedBy:    req.CreatedBy,
		ExpiresAt:    expires,
		SigningKeyID: i.keyring.keyID,
	}
	secret, err := i.keyring.sign(r)
	if err != nil {
		return Secret{}, Record{}, fmt.Errorf("sign key: %w", err)
	}
	if err := i.store.AddKey(r); err != nil {
		return Secret{}, Record{}, fmt.Errorf("store key: %w", err)
	}
	i.verifier.add(r)
	return secret, r, nil
}

// Reset replaces the signing key and returns how many live keys that invalidated. Every key issued
// before is refused from before it returns, also after a crash at any point of it.
func (i *Issuer) Reset(ctx context.Context) (invalidated int, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	ring, err := newKeyring(i.keyring.instanceID, now())
	if err != nil {
		return 0, err
	}
	// The keyring first: once it is replaced, a crash leaves only keys that nothing verifies. One that
	// was replaced counts from now on, however badly: the next start would refuse the old one's keys.
	saved := ring.save(i.path)
	if saved != nil && !errors.Is(saved, errNotDurable) {
		return 0, saved
	}
	invalidated, err = i.adopt(ring)
	return invalidated, errors.Join(saved, err)
}

// adopt makes ring, which is on disk, the one that counts: the keys of every other are refused.
func (i *Issuer) adopt(ring *keyring) (invalidated int, err error) {
	at := now()
	i.keyring = ring
	marked, invalidated := i.verifier.trust(ring.identity, at)
	if marked == 0 {
		return 0, nil
	}
	i.log.Warn("API keys of earlier signing keys are invalid from now on",
		"count", invalidated, "signing_key_id", ring.keyID)
	if err := i.store.RevokeKeysNotSignedBy(ring.keyID, at); err != nil {
		return invalidated, fmt.Errorf("record that earlier API keys are revoked (they are refused already): %w", err)
	}
	return invalidated, nil
}

// Counts says how many keys there are.
func (i *Issuer) Counts() Counts { return i.verifier.counts(time.Now()) }

// SigningKey describes the current signing key.
func (i *Issuer) SigningKey() SigningKey {
	i.mu.RLock()
	defer i.mu.RUnlock()
	return SigningKey{InstanceID: i.keyring.instanceID, ID: i.keyring.keyID, CreatedAt: i.keyring.createdAt}
}

// now is the time as records and tokens carry it.
func now() time.Time { return time.Now().UTC().Truncate(time.Millisecond) }
