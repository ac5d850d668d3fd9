package keys

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/audit"
)

// Issuer makes keys and replaces the signing key. It is safe for concurrent use.
type Issuer struct {
	path     string
	store    Store
	clock    *clock
	keys     *keySet
	suspects *suspects
	log      *slog.Logger

	// mu is held for reading while a key is made, so that many who make keys share the store's commits;
	// for writing by every other change: each sees what was there before it, and no key is acknowledged
	// that a reset beside it invalidated. What only asks does not wait for it.
	mu      sync.RWMutex
	keyring atomic.Pointer[keyring] // changed under mu
	// saving is held while usage is saved, with the time, and by a reset, which sets the time back. It is
	// taken after mu.
	saving sync.Mutex
}

// IssueRequest says what key to make.
type IssueRequest struct {
	// Name may be empty; see Record.
	Name string
	// Expire is as ParseExpiry takes it; empty means never.
	Expire string
	// Namespaces limits the key to these tenant namespaces; empty means every one.
	Namespaces []string
	// Scopes limits what the key may do; empty means everything.
	Scopes []Scope
	// CreatedBy is the uid of the local user who asks.
	CreatedBy uint32
}

// Issue makes a key. When it returns without an error the key is durable and Verify takes it. The
// Secret is the only copy. A bad request is errdefs.ErrInvalidArgument, a name that is taken
// errdefs.ErrAlreadyExists; while the clock is behind, errdefs.ErrFailedPrecondition.
func (i *Issuer) Issue(ctx context.Context, req IssueRequest) (Secret, Record, error) {
	if err := checkName(req.Name); err != nil {
		return Secret{}, Record{}, err
	}
	namespaces, err := cleanNamespaces(req.Namespaces)
	if err != nil {
		return Secret{}, Record{}, err
	}
	scopes, err := cleanScopes(req.Scopes)
	if err != nil {
		return Secret{}, Record{}, err
	}
	i.mu.RLock()
	defer i.mu.RUnlock()
	if err := ctx.Err(); err != nil {
		return Secret{}, Record{}, err
	}
	secret, r, err := i.draft(Record{
		Name: req.Name, Namespaces: namespaces, Scopes: scopes, Life: req.Expire, CreatedBy: req.CreatedBy,
	})
	if err != nil {
		return Secret{}, Record{}, err
	}
	if err := i.keys.reserve(r.Name); err != nil {
		return Secret{}, Record{}, err
	}
	defer i.keys.release(r.Name)
	if err := i.commit(Change{Put: []Record{r}, Events: []audit.Event{createEvent(r)}}); err != nil {
		return Secret{}, Record{}, fmt.Errorf("store key: %w", err)
	}
	return secret, r, nil
}

// draft completes the record of a new key, and signs its token. The caller holds i.mu.
func (i *Issuer) draft(r Record) (Secret, Record, error) {
	if err := i.clock.check(); err != nil {
		return Secret{}, Record{}, err
	}
	ring := i.keyring.Load()
	r.ID = randomID()
	r.SigningKeyID = ring.keyID
	r.CreatedAt = i.clock.time()
	var err error
	if r.ExpiresAt, err = ParseExpiry(r.Life, r.CreatedAt); err != nil {
		return Secret{}, Record{}, err
	}
	secret, err := ring.sign(r)
	if err != nil {
		return Secret{}, Record{}, fmt.Errorf("sign key: %w", err)
	}
	if n := len(secret.Reveal()); n > maxLength {
		return Secret{}, Record{}, fmt.Errorf("key would be %d characters long, of which %d are too many: name fewer namespaces, or none for all of them: %w",
			n, n-maxLength, errdefs.ErrInvalidArgument)
	}
	return secret, r, nil
}

// commit makes a change durable, and then effective. The caller holds i.mu.
func (i *Issuer) commit(c Change) error {
	if err := i.store.CommitKeys(c); err != nil {
		return err
	}
	i.keys.put(c.Put...)
	i.keys.remove(c.Delete...)
	return nil
}

// Counts says how many keys there are.
func (i *Issuer) Counts() Counts { return i.keys.counts() }

// SigningKey describes the current signing key.
func (i *Issuer) SigningKey() SigningKey {
	ring := i.keyring.Load()
	return SigningKey{InstanceID: ring.instanceID, ID: ring.keyID, CreatedAt: ring.createdAt}
}

// ClockBehind is how far the clock lies behind the latest time that the server has seen, if that is more
// than a correction of the clock explains, else 0. Keys that expire are judged by the latter, and no key
// can be made.
func (i *Issuer) ClockBehind() time.Duration { return i.clock.behind() }

// Now is the time by which keys live and die; see ClockBehind.
func (i *Issuer) Now() time.Time { return i.clock.time() }

// Run saves the usage of keys every minute, and at the end of ctx; it returns nil then. What cannot be
// saved is logged and tried again.
func (i *Issuer) Run(ctx context.Context) error {
	save := time.NewTicker(usageInterval)
	defer save.Stop()
	watch := time.NewTicker(time.Second)
	defer watch.Stop()
	for {
		select {
		case <-save.C:
			i.saveUsage()
			i.reportSuspects() // those that could not be written
		case <-i.suspects.waiting:
			i.reportSuspects()
		case <-watch.C:
			if i.clock.stepped() {
				i.keys.expireAll()
			}
		case <-ctx.Done():
			i.saveUsage()
			i.reportSuspects()
			return nil
		}
	}
}
