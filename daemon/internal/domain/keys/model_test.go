package keys

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/sys/randtest"
)

// modelKey is a key in the model.
type modelKey struct {
	id, token string
	// phase never decreases.
	phase atomic.Int32
}

const (
	valid   int32 = iota // the key must be accepted
	ending               // a call that makes the key invalid has begun: it may be accepted or refused
	invalid              // that call has returned: the key must be refused
)

// model holds all keys that were ever created.
type model struct {
	mu   sync.Mutex
	keys []*modelKey
	// resets counts the beginnings and the ends of resets, so it is odd during a reset.
	resets int
}

// beforeCreate must be called before a key is created. Its result must be passed to add.
func (m *model) beforeCreate() (resets int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.resets
}

// add adds a key that was created.
func (m *model) add(id, token string, resets int) *modelKey {
	m.mu.Lock()
	defer m.mu.Unlock()
	k := &modelKey{id: id, token: token}
	if resets%2 == 1 || resets != m.resets {
		k.phase.Store(ending) // a concurrent reset may have invalidated it
	}
	m.keys = append(m.keys, k)
	return k
}

// randomKey returns one of the keys, or nil if there are none.
func (m *model) randomKey(rnd *rand.Rand) *modelKey {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.keys) == 0 {
		return nil
	}
	return m.keys[rnd.IntN(len(m.keys))]
}

// setPhase raises the phase of k to phase, unless it is higher already.
func (m *model) setPhase(k *modelKey, phase int32) {
	for {
		was := k.phase.Load()
		if was >= phase || k.phase.CompareAndSwap(was, phase) {
			return
		}
	}
}

// reset calls do, which resets the signing key, and updates the model. Only one reset may run at a time.
func (m *model) reset(do func() error) error {
	m.mu.Lock()
	m.resets++
	before := m.keys[:len(m.keys):len(m.keys)]
	for _, k := range before {
		m.setPhase(k, ending)
	}
	m.mu.Unlock()
	err := do()
	m.mu.Lock()
	m.resets++
	m.mu.Unlock()
	for _, k := range before {
		m.setPhase(k, invalid)
	}
	return err
}

// check uses a key, and returns an error if the result contradicts the model.
func (m *model) check(v *Verifier, k *modelKey) error {
	before := k.phase.Load()
	p, err := v.Verify(k.token, from)
	ctx, cancel := p.Bind(context.Background())
	defer cancel()
	after := k.phase.Load()
	switch {
	case before == invalid && err == nil:
		return fmt.Errorf("key %s is accepted although it is invalid", k.id)
	case after == valid && err != nil:
		return fmt.Errorf("key %s is refused although it is valid: %v", k.id, err.(*rejection).LogValue())
	case after == valid && ctx.Err() != nil:
		return fmt.Errorf("a request of key %s is canceled although the key is valid", k.id)
	case err == nil && p.KeyID != k.id:
		return fmt.Errorf("the token of key %s gives the principal of key %s", k.id, p.KeyID)
	}
	if again, cancel := p.Bind(context.Background()); err == nil && before == invalid && again.Err() == nil {
		cancel()
		return fmt.Errorf("a request of key %s is not canceled although the key is invalid", k.id)
	} else {
		cancel()
	}
	return nil
}

// If keys are concurrently created, used, revoked, rotated, pruned, reset and restored, each key is accepted and
// refused as the model requires. The seed decides the steps of each goroutine, but not how they interleave.
func TestConcurrentUseAgreesWithAModel(t *testing.T) {
	t.Parallel()
	store, path := NewMemory(), keyringPath(t)
	i, v := openIssuer(t, store, path)
	stop := run(t, i)
	ctx := context.Background()
	m := new(model)
	steps := iterations(t, 1500, 60_000)
	seed := randtest.Seed(t)

	var wg sync.WaitGroup
	worker := func(n int, work func(rnd *rand.Rand) error) {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(n)))
			for range steps / 8 {
				if err := work(rnd); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	issueOne := func(rnd *rand.Rand) error {
		name := ""
		if rnd.IntN(2) == 0 {
			name = fmt.Sprint("name-", rnd.IntN(10))
		}
		resets := m.beforeCreate()
		secret, r, err := i.Issue(ctx, IssueRequest{Name: name})
		if name != "" && errdefs.IsAlreadyExists(err) {
			return nil
		}
		if err != nil {
			return err
		}
		return m.check(v, m.add(r.ID, secret.Reveal(), resets))
	}
	use := func(rnd *rand.Rand) error {
		for range 5 {
			if k := m.randomKey(rnd); k != nil {
				if err := m.check(v, k); err != nil {
					return err
				}
			}
		}
		return nil
	}
	// restoreMu keeps resets from running between a backup and its restore, because a restore undoes a reset.
	var restoreMu sync.RWMutex
	change := func(rnd *rand.Rand) error {
		k := m.randomKey(rnd)
		if k == nil {
			return nil
		}
		switch rnd.IntN(11) {
		case 0, 1, 2:
			m.setPhase(k, ending)
			if _, err := i.Revoke(ctx, k.id, 0); err != nil && !errdefs.IsNotFound(err) { // not found if pruned
				return err
			}
			m.setPhase(k, invalid)
		case 3, 4:
			m.setPhase(k, ending)
			resets := m.beforeCreate()
			secret, created, _, err := i.Rotate(ctx, RotateRequest{Ref: k.id})
			if errdefs.IsFailedPrecondition(err) || errdefs.IsNotFound(err) {
				return nil // revoked, already rotated (perhaps still in the grace period), or pruned
			}
			if err != nil {
				return err
			}
			m.setPhase(k, invalid)
			return m.check(v, m.add(created.ID, secret.Reveal(), resets))
		case 5:
			resets := m.beforeCreate()
			secret, created, _, err := i.Rotate(ctx, RotateRequest{Ref: k.id, Grace: "1h"})
			if err == nil {
				// The old key remains valid until a later step revokes it.
				return m.check(v, m.add(created.ID, secret.Reveal(), resets))
			}
			if !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) {
				return err
			}
		case 6:
			if _, err := i.Prune(ctx, "", false, 0); err != nil {
				return err
			}
		case 7:
			restoreMu.RLock()
			defer restoreMu.RUnlock()
			var b backup
			err := i.Snapshot(func(keyring Secret) error {
				b = backup{keyring, i.keys.records()}
				return nil
			})
			if err != nil {
				return err
			}
			if err := use(rnd); err != nil { // also gives other goroutines time to revoke and rotate keys
				return err
			}
			if _, _, err := i.Restore(ctx, b.keyring, b.records, 0); err != nil {
				return err
			}
		case 8:
			if rnd.IntN(10) > 0 {
				return nil
			}
			restoreMu.Lock()
			defer restoreMu.Unlock()
			return m.reset(func() error {
				_, err := i.Reset(ctx, 0)
				return err
			})
		default:
			if _, _, err := i.List(Filter{State: Live}, "", 20); err != nil {
				return err
			}
			if _, err := i.Find(k.id); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
			i.Counts()
			i.saveUsage() // as Run does every minute
		}
		return nil
	}
	for n := range 3 {
		worker(10+n, issueOne)
		worker(20+n, use)
		worker(30+n, change)
	}
	wg.Wait()
	stop()

	// After all goroutines have finished, the model, the memory and the state after a restart must agree.
	if err := issueOne(rand.New(rand.NewPCG(seed, 0))); err != nil { // so that there is a valid key even if the last step was a reset
		t.Error(err)
	}
	var accepted int
	for _, k := range m.keys {
		if err := m.check(v, k); err != nil {
			t.Error(err)
		}
		if _, err := v.Verify(k.token, from); err == nil {
			accepted++
		}
	}
	if c := i.Counts(); c.Live != accepted {
		t.Errorf("%d keys are accepted, counts are %+v", accepted, c)
	}
	again, v2 := openIssuer(t, store, path)
	for _, k := range m.keys {
		_, before := v.Verify(k.token, from)
		if _, after := v2.Verify(k.token, from); (before == nil) != (after == nil) {
			t.Errorf("key %s: %v before a restart, %v after it", k.id, before, after)
		}
	}
	if again.Counts() != i.Counts() {
		t.Errorf("counts were %+v and are %+v after a restart", i.Counts(), again.Counts())
	}
	names := map[string]string{}
	for _, r := range again.keys.records() {
		if !r.holdsName(again.clock.time()) {
			continue
		}
		if other, ok := names[r.Name]; ok {
			t.Errorf("keys %s and %s both have the name %s", other, r.ID, r.Name)
		}
		names[r.Name] = r.ID
	}
	t.Logf("%d keys were created, %d are live after %d resets", len(m.keys), accepted, m.resets/2)
}
