package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
	"github.com/msbd/msbd/daemon/internal/sys/randtest"
)

const (
	churnKeys    = 10_000 // before the first kill
	churnWorkers = 4
)

// fullVerifyEvery is how many kills lie between two comparisons of the whole key list and audit log. Whatever a kill
// loses stays lost, so a later comparison finds it; after every kill the keys that changed are compared.
const fullVerifyEvery = 20

// TestKillsUnderKeyChurn kills the server at random moments while API keys are created, rotated and revoked, and
// checks that every change the server acknowledged is still there after the restart. With MSB_SOAK=1 it kills the
// server 10,000 times.
func TestKillsUnderKeyChurn(t *testing.T) {
	parallel(t)
	kills := 200
	if os.Getenv("MSB_SOAK") != "" {
		kills = 10_000
	}
	s := testServer(t)
	c := &churn{s: s, seed: randtest.Seed(t), keys: map[string]*churned{}}
	c.rnd = c.generator()
	c.fill(t)

	var restarts []time.Duration
	for kill := range kills {
		if kill%5 == 4 { // kill it while it starts
			s.kill()
			if err := s.launch(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(c.rnd.Int64N(int64(patience * 500 * time.Millisecond))))
		} else {
			c.round(t, c.rnd.IntN(40))
		}
		s.kill()
		began := time.Now()
		if err := s.start(); err != nil {
			t.Fatalf("kill %d: %v", kill, err)
		}
		restarts = append(restarts, time.Since(began))
		if kill%fullVerifyEvery == fullVerifyEvery-1 {
			c.verifyAll(t)
		} else {
			c.verifyChanged(t)
		}
		if t.Failed() {
			t.Fatalf("after kill %d", kill)
		}
	}
	c.verifyAll(t)
	c.accepted(t, c.ids)
	t.Logf("%d kills; %d calls acknowledged, %d without an answer; %d keys; restart p50 %v, p99 %v", kills, c.acked.Load(), c.unanswered,
		len(c.keys), percentile(restarts, 50).Round(time.Millisecond), percentile(restarts, 99).Round(time.Millisecond))
}

// churned is a key and what the server's answers say of it.
type churned struct {
	key  string
	info *adminv1.Key // as it was when it was made
	// refused for good
	revoked bool
	// in doubt: a call that would have revoked it had no answer
	doubt bool
	// replaced keys go on for their grace period, but cannot be rotated again
	replaced bool
}

// churn makes, rotates and revokes keys, and remembers what was acknowledged.
type churn struct {
	s          *server
	seed       uint64
	generators uint64     // how many generator has returned
	rnd        *rand.Rand // for the test's own goroutine
	acked      atomic.Int64
	killing    atomic.Bool

	mu   sync.Mutex
	keys map[string]*churned // by id
	ids  []string            // of keys, as they were created
	// changed are the ids of this round's.
	changed []string
	// unanswered calls may each have made a key that nobody has.
	unanswered int
}

// generator returns a random number generator for one goroutine.
func (c *churn) generator() *rand.Rand {
	c.generators++
	return rand.New(rand.NewPCG(c.seed, c.generators))
}

// fill creates the keys that are there before the first kill.
func (c *churn) fill(t *testing.T) {
	t.Helper()
	a := c.s.admin(t)
	const workers = 64
	var g errgroup.Group
	for worker := range workers {
		rnd := c.generator()
		g.Go(func() error {
			for n := worker; n < churnKeys; n += workers {
				if err := c.create(t.Context(), a, rnd); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	c.changed = nil
}

// round changes keys until so many calls were acknowledged, and kills the server amid the next.
func (c *churn) round(t *testing.T, calls int) {
	t.Helper()
	a := c.s.admin(t)
	defer a.Close()
	own := make([][]string, churnWorkers) // by worker, so that none changes another's key
	for _, id := range c.shuffled() {
		k := c.keys[id]
		if n := c.rnd.IntN(churnWorkers); !k.revoked && !k.replaced && len(own[n]) < calls {
			own[n] = append(own[n], id)
		}
	}
	c.killing.Store(false)
	until := c.acked.Load() + int64(calls)
	var g errgroup.Group
	for _, ids := range own {
		rnd := c.generator()
		g.Go(func() error {
			for {
				err := c.call(t.Context(), a, rnd, &ids)
				if err == nil && c.acked.Add(1) >= until && c.killing.CompareAndSwap(false, true) {
					c.s.cmd.Process.Kill()
				}
				if c.killing.Load() {
					return nil
				}
				if err != nil {
					return err
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

// call makes one random call to change a key or look at one.
func (c *churn) call(ctx context.Context, a *client.Admin, rnd *rand.Rand, ids *[]string) error {
	choice := rnd.IntN(10)
	if len(*ids) == 0 || choice < 4 {
		return c.create(ctx, a, rnd)
	}
	i := rnd.IntN(len(*ids))
	id := (*ids)[i]
	if choice == 9 {
		k, err := a.Key(ctx, id)
		if err == nil && k.GetState() != adminv1.KeyState_KEY_STATE_LIVE {
			return fmt.Errorf("key %s is %v and was not revoked", id, k)
		}
		return err
	}
	*ids = slices.Delete(*ids, i, i+1)
	if choice < 7 {
		return c.rotate(ctx, a, rnd, id)
	}
	return c.revoke(ctx, a, id)
}

func (c *churn) create(ctx context.Context, a *client.Admin, rnd *rand.Rand) error {
	req := &adminv1.CreateKeyRequest{}
	if rnd.IntN(2) == 0 {
		req.Expire = "1y"
	}
	if rnd.IntN(2) == 0 {
		req.Namespaces = []string{"team-alpha", "project-web"}
	}
	if rnd.IntN(2) == 0 {
		req.Name = fmt.Sprintf("key-%x", rnd.Uint64())
	}
	resp, err := a.CreateKey(ctx, req)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.unanswered++
		return err
	}
	c.add(resp.GetKey(), resp.GetInfo())
	return nil
}

func (c *churn) rotate(ctx context.Context, a *client.Admin, rnd *rand.Rand, id string) error {
	req := &adminv1.RotateKeyRequest{Ref: id}
	if rnd.IntN(2) == 0 {
		req.Grace = "1d"
	}
	resp, err := a.RotateKey(ctx, req)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changed = append(c.changed, id)
	old := c.keys[id]
	old.replaced = true
	if err != nil {
		c.unanswered++
		old.doubt = req.Grace == ""
		return err
	}
	old.revoked = req.Grace == ""
	c.add(resp.GetKey(), resp.GetInfo())
	return nil
}

func (c *churn) revoke(ctx context.Context, a *client.Admin, id string) error {
	_, err := a.RevokeKey(ctx, id)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changed = append(c.changed, id)
	if err != nil {
		c.keys[id].doubt = true
		return err
	}
	c.keys[id].revoked = true
	// From now on, not from a restart on.
	if ok, err := c.s.accepts(c.keys[id].key); ok && err == nil {
		return fmt.Errorf("key %s is accepted after it was revoked", id)
	}
	return nil
}

func (c *churn) add(key string, info *adminv1.Key) {
	c.keys[info.GetId()] = &churned{key: key, info: info}
	c.ids = append(c.ids, info.GetId())
	c.changed = append(c.changed, info.GetId())
}

// verifyChanged compares the keys that changed since the last call, and a few others, with what the server
// acknowledged.
func (c *churn) verifyChanged(t *testing.T) {
	t.Helper()
	a := c.s.admin(t)
	defer a.Close()
	check := c.sample(20)
	for _, id := range check {
		got, err := a.Key(t.Context(), id)
		if err != nil && !errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
		c.compare(t, id, got)
	}
	c.accepted(t, check)
}

// verifyAll compares all keys in the server's list with what it acknowledged, and verifies the audit log.
func (c *churn) verifyAll(t *testing.T) {
	t.Helper()
	a := c.s.admin(t)
	defer a.Close()
	listed := map[string]*adminv1.Key{}
	for k, err := range a.Keys(t.Context(), nil) {
		if err != nil {
			t.Fatal(err)
		}
		if listed[k.GetId()] != nil {
			t.Errorf("key %s is listed twice", k.GetId())
		}
		listed[k.GetId()] = k
	}
	extra := len(listed)
	for id := range c.keys {
		c.compare(t, id, listed[id])
		if listed[id] != nil {
			extra--
		}
	}
	if extra > c.unanswered {
		t.Errorf("the server lists %d keys that no answered call created, after %d calls without an answer", extra, c.unanswered)
	}
	c.accepted(t, c.sample(50))
	audit, err := a.VerifyAudit(t.Context())
	if err != nil || audit.GetProblem() != "" || audit.GetEntries() < uint64(len(c.keys)) {
		t.Errorf("audit log: %v, %v", audit, err)
	}
}

// compare compares one key with what the server acknowledged. got is nil if the server does not have the key.
func (c *churn) compare(t *testing.T, id string, got *adminv1.Key) {
	t.Helper()
	k := c.keys[id]
	if got == nil {
		t.Errorf("key %s is lost", id)
		return
	}
	revoked := got.GetState() == adminv1.KeyState_KEY_STATE_REVOKED
	if k.doubt {
		k.revoked, k.doubt = revoked, false // either is right, and must not change again
	}
	if revoked != k.revoked || got.GetName() != k.info.GetName() || !slices.Equal(got.GetNamespaces(), k.info.GetNamespaces()) ||
		!got.GetExpiresAt().AsTime().Equal(k.info.GetExpiresAt().AsTime()) {
		t.Errorf("key %s, created as %v, is %v; want revoked: %t", id, k.info, got, k.revoked)
	}
}

// sample returns the ids of the keys that changed since its last call, and of so many others.
func (c *churn) sample(others int) []string {
	ids := c.changed
	c.changed = nil
	ids = append(ids, c.shuffled()[:min(others, len(c.ids))]...)
	slices.Sort(ids)
	return slices.Compact(ids)
}

// shuffled returns the ids of all keys in random order.
func (c *churn) shuffled() []string {
	ids := slices.Clone(c.ids)
	c.rnd.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
	return ids
}

// accepted sends a request with each key, and checks that the revoked ones are refused and the others accepted.
func (c *churn) accepted(t *testing.T, ids []string) {
	t.Helper()
	var g errgroup.Group
	g.SetLimit(16)
	for _, id := range ids {
		g.Go(func() error {
			if ok, err := c.s.accepts(c.keys[id].key); err != nil || ok == c.keys[id].revoked {
				return fmt.Errorf("key %s: accepted: %t, %v; revoked: %t", id, ok, err, c.keys[id].revoked)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// admin is a connection of the test's own to the admin socket.
func (s *server) admin(t testing.TB) *client.Admin {
	a := &client.Admin{Socket: filepath.Join(s.runDir, "msbd.sock")}
	t.Cleanup(func() { a.Close() })
	return a
}

// fromAnywhere makes each request from another loopback address, since bad keys are limited by address.
var fromAnywhere = &http.Client{Transport: &http.Transport{
	DisableKeepAlives: true,
	DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, byte(1+rand.IntN(254)), byte(rand.IntN(255)), byte(1+rand.IntN(254)))}}
		return d.DialContext(ctx, network, address)
	},
}}

// accepts says whether a key is accepted. An error says that it cannot be told.
func (s *server) accepts(key string) (bool, error) {
	body := strings.NewReader(`{"jsonrpc": "2.0", "id": 1, "method": "sandbox.metrics.get", "params": {"namespace": "*"}}`)
	req, err := http.NewRequest(http.MethodPost, "http://"+s.address+"/api/v1/rpc", body)
	if err != nil {
		return false, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+key)
	res, err := fromAnywhere.Do(req)
	if err != nil {
		return false, err
	}
	res.Body.Close()
	switch res.StatusCode {
	case http.StatusOK:
		return true, nil
	case http.StatusUnauthorized:
		return false, nil
	default:
		return false, fmt.Errorf("neither accepted nor refused: %s", res.Status)
	}
}

// TestKillsUnderSandboxChurn does the same while sandboxes are started and stopped.
func TestKillsUnderSandboxChurn(t *testing.T) {
	parallel(t)
	s := testServer(t)
	if err := s.importImages("python"); err != nil {
		t.Fatal(err)
	}
	key := s.key(t)
	names := []string{"even", "odd"}
	rnd := randtest.New(t)
	// What the server's answers say of each: running, stopped, or "" for a call without an answer.
	state := map[string]string{"even": "stopped", "odd": "stopped"}
	for kill := range 5 {
		var mu sync.Mutex
		var killed atomic.Bool
		var g sync.WaitGroup
		for _, name := range names {
			g.Go(func() {
				for !killed.Load() {
					mu.Lock()
					method, next := "sandbox.start", "running"
					if state[name] == "running" {
						method, next = "sandbox.stop", "stopped"
					}
					state[name] = ""
					mu.Unlock()
					a, err := s.call(key, method, params{"sandbox": name})
					if err == nil && a.Error != nil && !killed.Load() {
						t.Errorf("%s %s: %v", method, name, a)
					}
					if err != nil || a.Error != nil {
						return
					}
					mu.Lock()
					state[name] = next
					mu.Unlock()
				}
			})
		}
		time.Sleep(time.Duration(rnd.Int64N(int64(patience * 8 * time.Second)))) // a start takes half of it
		killed.Store(true)
		s.kill()
		g.Wait()
		if err := s.start(); err != nil {
			t.Fatalf("kill %d: %v", kill, err)
		}
		running := 0
		for _, name := range names {
			a, err := s.call(key, "sandbox.command.run", params{"sandbox": name, "command": "true"})
			if err != nil {
				t.Fatal(err)
			}
			runs := a.Error == nil
			// Without an answer it may be as before or after, or have failed for being cut off.
			if known := state[name]; known != "" && runs != (known == "running") {
				t.Errorf("kill %d: %s was acknowledged as %s: %v", kill, name, known, a)
			}
			state[name] = "stopped"
			if runs {
				state[name] = "running"
				running++
			}
		}
		if found := s.microVMs(); len(found) != running {
			t.Errorf("kill %d: %d microVMs for %d running sandboxes", kill, len(found), running)
		}
	}
}
