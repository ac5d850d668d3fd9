package keys

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/audit"
)

// Issuer creates and changes keys and replaces the signing key. It is safe for concurrent use.
type Issuer struct {
	path     string
	store    Store
	clock    *clock
	keys     *keySet
	suspects *suspects
	log      *slog.Logger

	// Issue holds mu for reading, so that concurrent calls can share a commit of the store. Every other change
	// holds mu for writing: each change sees the result of the previous ones, and Issue never returns a key that a
	// concurrent reset has invalidated. Snapshot also holds mu for writing, although it changes nothing, so that
	// nothing changes while a snapshot is taken. The other methods that change nothing do not use mu.
	mu      sync.RWMutex
	keyring atomic.Pointer[keyring] // changed only while mu is held for writing
	// saving is held while usage and the latest time are saved, and during a reset, which may set the latest time
	// back. If both locks are needed, mu is locked first.
	saving sync.Mutex
}

// IssueRequest describes the key to create.
type IssueRequest struct {
	// Name may be empty. See Record.Name.
	Name string
	// Expire is how long the key is valid, in the format of ParseExpiry. Empty means forever.
	Expire string
	// Namespaces limits the key to these tenant namespaces. Empty means all namespaces.
	Namespaces []string
	// Scopes limits what the key may do. Empty means everything.
	Scopes []Scope
	// CreatedBy is the uid of the local user who creates the key.
	CreatedBy uint32
}

// Issue creates a key. When Issue returns without an error, the key is durable and Verify accepts it. The Secret is
// the only copy of the key. The error is errdefs.ErrInvalidArgument if the request is invalid,
// errdefs.ErrAlreadyExists if the name is in use, and errdefs.ErrFailedPrecondition while the clock is behind.
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
	if len(namespaces) > 0 && slices.Contains(scopes, ScopeMetrics) {
		return Secret{}, Record{}, fmt.Errorf("the scope %s covers the whole server, so it does not work in a key with namespaces: "+
			"omit the scope or the namespaces: %w", ScopeMetrics, errdefs.ErrInvalidArgument)
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
	if err := i.commit(Change{Put: []Record{r}, Clock: r.CreatedAt, Events: []audit.Event{createEvent(r)}}); err != nil {
		return Secret{}, Record{}, fmt.Errorf("store key: %w", err)
	}
	return secret, r, nil
}

// draft completes the record of a new key and signs its token. The record's CreatedAt may be later than the clock, so the
// change that stores it must move the clock. The caller holds i.mu.
func (i *Issuer) draft(r Record) (Secret, Record, error) {
	if err := i.clock.checkNotBehind(); err != nil {
		return Secret{}, Record{}, err
	}
	ring := i.keyring.Load()
	r.ID = randomID()
	r.SigningKeyID = ring.keyID
	r.CreatedAt = i.clock.latest() // so that the key does not expire earlier than requested
	var err error
	if r.ExpiresAt, err = ParseExpiry(r.Life, r.CreatedAt); err != nil {
		return Secret{}, Record{}, err
	}
	secret, err := ring.sign(r)
	if err != nil {
		return Secret{}, Record{}, fmt.Errorf("sign key: %w", err)
	}
	if n := len(secret.Reveal()); n > maxLength {
		return Secret{}, Record{}, fmt.Errorf("key would be %d characters long, the maximum is %d: name fewer namespaces, or none to allow all: %w",
			n, maxLength, errdefs.ErrInvalidArgument)
	}
	return secret, r, nil
}

// commit makes a change durable and then applies it in memory. With the change, the store remembers the time, so that no
// restart undoes a revocation or expiry. If c.Clock is later, the clock moves forward to it. The caller holds i.mu.
func (i *Issuer) commit(c Change) error {
	if now := i.clock.time(); now.After(c.Clock) {
		c.Clock = now
	}
	if err := i.store.CommitKeys(c); err != nil {
		return err
	}
	i.clock.advance(c.Clock)
	i.keys.apply(c.Delete, c.Put)
	return nil
}

// Counts returns the number of keys in each state.
func (i *Issuer) Counts() Counts { return i.keys.counts() }

// SigningKey returns information about the current signing key.
func (i *Issuer) SigningKey() SigningKey {
	ring := i.keyring.Load()
	return SigningKey{InstanceID: ring.instanceID, ID: ring.keyID, CreatedAt: ring.createdAt}
}

// ClockBehind returns how far the wall clock is behind the latest time that the server has used. It returns 0 if the
// difference is at most 5 minutes, which a time server may have corrected. While the clock is behind, keys expire
// by the latest time used, and no key can be created.
func (i *Issuer) ClockBehind() time.Duration { return i.clock.behind() }

// ClockAhead returns how far the wall clock was set forward if the server does not use the new time yet, and for how long
// it waits to see whether the wall clock stays there. Otherwise ahead is 0.
func (i *Issuer) ClockAhead() (ahead, wait time.Duration) { return i.clock.ahead() }

// Now returns the time that decides whether a key has expired. It goes back only in AcceptClock and in Reset.
func (i *Issuer) Now() time.Time { return i.clock.time() }

// Run saves the usage of keys every minute and when ctx is done, and then returns nil. It also writes suspicious
// tokens to the audit log, watches the wall clock, and ends the sessions of expired keys when it was set forward. If
// something cannot be saved, Run logs the error and tries again.
func (i *Issuer) Run(ctx context.Context) error {
	save := time.NewTicker(usageInterval)
	defer save.Stop()
	watch := time.NewTicker(time.Second)
	defer watch.Stop()
	for {
		select {
		case <-save.C:
			i.saveUsage()
			i.reportSuspects() // retry events that could not be written before
		case <-i.suspects.waiting:
			i.reportSuspects()
		case <-watch.C:
			if i.clock.stepped() {
				i.keys.refreshAll()
			}
		case <-ctx.Done():
			i.saveUsage()
			i.reportSuspects()
			return nil
		}
	}
}
