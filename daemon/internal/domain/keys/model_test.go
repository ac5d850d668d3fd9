package keys

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
)

// modelKey is what the model knows of a key.
type modelKey struct {
	id, token string
	// phase only grows.
	phase atomic.Int32
}

const (
	good     int32 = iota // it must be taken
	ending                // something that ends it has begun: it may be taken or not
	finished              // that has returned: it must be refused
)

// model is every key that was ever made.
type model struct {
	mu   sync.Mutex
	keys []*modelKey
	// resets counts the beginnings and the ends of resets: it is odd during one.
	resets int
}

// making is called before a key is made, and made after it.
func (m *model) making() (resets int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.resets
}

func (m *model) made(id, token string, resets int) *modelKey {
	m.mu.Lock()
	defer m.mu.Unlock()
	k := &modelKey{id: id, token: token}
	if resets%2 == 1 || resets != m.resets {
		k.phase.Store(ending) // a reset beside it may have ended it
	}
	m.keys = append(m.keys, k)
	return k
}

func (m *model) any(rnd *rand.Rand) *modelKey {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.keys) == 0 {
		return nil
	}
	return m.keys[rnd.IntN(len(m.keys))]
}

func (m *model) end(k *modelKey, phase int32) {
	for {
		was := k.phase.Load()
		if was >= phase || k.phase.CompareAndSwap(was, phase) {
			return
		}
	}
}

// reset wraps a reset, of which there is one at a time.
func (m *model) reset(do func() error) error {
	m.mu.Lock()
	m.resets++
	before := m.keys[:len(m.keys):len(m.keys)]
	for _, k := range before {
		m.end(k, ending)
	}
	m.mu.Unlock()
	err := do()
	m.mu.Lock()
	m.resets++
	m.mu.Unlock()
	for _, k := range before {
		m.end(k, finished)
	}
	return err
}

// check uses a key and says what is wrong.
func (m *model) check(v *Verifier, k *modelKey) error {
	before := k.phase.Load()
	p, err := v.Verify(k.token, from)
	ctx, cancel := p.Bind(context.Background())
	defer cancel()
	after := k.phase.Load()
	switch {
	case before == finished && err == nil:
		return fmt.Errorf("key %s is taken after it was ended", k.id)
	case after == good && err != nil:
		return fmt.Errorf("key %s is refused though nothing ended it: %v", k.id, err.(*rejection).LogValue())
	case after == good && ctx.Err() != nil:
		return fmt.Errorf("a request of key %s is cut though nothing ended it", k.id)
	case err == nil && p.KeyID != k.id:
		return fmt.Errorf("key %s speaks for %s", k.id, p.KeyID)
	}
	if again, cancel := p.Bind(context.Background()); err == nil && before == finished && again.Err() == nil {
		cancel()
		return fmt.Errorf("a request of key %s goes on", k.id)
	} else {
		cancel()
	}
	return nil
}

// R7: keys that are made, used, revoked, rotated, pruned, reset and restored at once are taken and refused
// as each of them alone would have it.
func TestConcurrentUseAgreesWithAModel(t *testing.T) {
	t.Parallel()
	store, path := NewMemory(), keyringPath(t)
	i, v := openIssuer(t, store, path)
	stop := run(t, i)
	ctx := context.Background()
	m := new(model)
	steps := count(t, 3000, 60_000)

	var wg sync.WaitGroup
	worker := func(n int, work func(rnd *rand.Rand) error) {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(n), 7))
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
		resets := m.making()
		secret, r, err := i.Issue(ctx, IssueRequest{Name: name})
		if name != "" && errdefs.IsAlreadyExists(err) {
			return nil
		}
		if err != nil {
			return err
		}
		return m.check(v, m.made(r.ID, secret.Reveal(), resets))
	}
	use := func(rnd *rand.Rand) error {
		for range 5 {
			if k := m.any(rnd); k != nil {
				if err := m.check(v, k); err != nil {
					return err
				}
			}
		}
		return nil
	}
	// Between a backup and its restore there is no reset, which that would undo, and no prune, which
	// forgets that a key was revoked.
	var alone sync.RWMutex
	change := func(rnd *rand.Rand) error {
		k := m.any(rnd)
		if k == nil {
			return nil
		}
		switch rnd.IntN(11) {
		case 0, 1, 2:
			m.end(k, ending)
			if _, err := i.Revoke(ctx, k.id, 0); err != nil && !errdefs.IsNotFound(err) { // pruned
				return err
			}
			m.end(k, finished)
		case 3, 4:
			m.end(k, ending)
			resets := m.making()
			secret, made, _, err := i.Rotate(ctx, RotateRequest{Ref: k.id})
			if errdefs.IsFailedPrecondition(err) || errdefs.IsNotFound(err) {
				return nil // revoked, rotated (perhaps with a grace period that goes on) or pruned
			}
			if err != nil {
				return err
			}
			m.end(k, finished)
			return m.check(v, m.made(made.ID, secret.Reveal(), resets))
		case 5:
			resets := m.making()
			secret, made, _, err := i.Rotate(ctx, RotateRequest{Ref: k.id, Grace: "1h"})
			if err == nil {
				// The old one is live still, but ends with the next that is tried on it.
				return m.check(v, m.made(made.ID, secret.Reveal(), resets))
			}
			if !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) {
				return err
			}
		case 6:
			alone.Lock()
			defer alone.Unlock()
			if _, err := i.Prune(ctx, "", false, 0); err != nil {
				return err
			}
		case 7:
			alone.RLock()
			defer alone.RUnlock()
			var b backup
			err := i.Snapshot(func(keyring Secret) error {
				b = backup{keyring, i.keys.records()}
				return nil
			})
			if err != nil {
				return err
			}
			if err := use(rnd); err != nil { // and let others revoke and rotate
				return err
			}
			if _, _, err := i.Restore(ctx, b.keyring, b.records, 0); err != nil {
				return err
			}
		case 8:
			if rnd.IntN(10) > 0 {
				return nil
			}
			alone.Lock()
			defer alone.Unlock()
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
			i.saveUsage() // as each minute
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

	// Now that all is quiet, everything agrees: the model, memory, and what a restart finds.
	if err := issueOne(rand.New(rand.NewPCG(0, 0))); err != nil { // a reset may have been the last
		t.Error(err)
	}
	var taken int
	for _, k := range m.keys {
		if err := m.check(v, k); err != nil {
			t.Error(err)
		}
		if _, err := v.Verify(k.token, from); err == nil {
			taken++
		}
	}
	if c := i.Counts(); c.Live != taken {
		t.Errorf("%d keys are taken, counts are %+v", taken, c)
	}
	again, v2 := openIssuer(t, store, path)
	for _, k := range m.keys {
		_, before := v.Verify(k.token, from)
		if _, after := v2.Verify(k.token, from); (before == nil) != (after == nil) {
			t.Errorf("key %s: %v, and after a restart %v", k.id, before, after)
		}
	}
	if again.Counts() != i.Counts() {
		t.Errorf("counts were %+v and are %+v", i.Counts(), again.Counts())
	}
	names := map[string]string{}
	for _, r := range again.keys.records() {
		if !r.holdsName(again.clock.time()) {
			continue
		}
		if other, ok := names[r.Name]; ok {
			t.Errorf("keys %s and %s have the name %s", other, r.ID, r.Name)
		}
		names[r.Name] = r.ID
	}
	t.Logf("%d keys were made, %d are live after %d resets", len(m.keys), taken, m.resets/2)
}
