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
	"github.com/msbd/msbd/daemon/benchtest"
	"github.com/msbd/msbd/daemon/internal/sys/randtest"
)

const churnWorkers = 4

// fullVerifyEvery is the number of kills from one comparison of all keys and the audit log to the next. A change that
// is lost in a kill stays lost, so a later comparison finds it. After every kill, the keys that changed are compared.
const fullVerifyEvery = 20

// TestKillsUnderKeyChurn kills the server at random moments while API keys are created, rotated and revoked, and
// checks that every change the server acknowledged is still there after the restart. With MSB_SOAK=1 it kills the
// server 10,000 times, with at least 10,000 keys.
func TestKillsUnderKeyChurn(t *testing.T) {
	parallel(t)
	kills, keys := 200, 2_000
	if os.Getenv("MSB_SOAK") != "" {
		kills, keys = 10_000, 10_000
	}
	s := testServer(t)
	c := &churn{s: s, seed: randtest.Seed(t), keys: map[string]*churnKey{}}
	c.rnd = c.generator()
	c.fill(t, keys)

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
			t.Fatalf("the checks failed after kill %d", kill)
		}
	}
	c.verifyAll(t)
	c.checkAccepted(t, c.ids)
	t.Logf("%d kills; %d calls acknowledged, %d without a response; %d keys; restart p50 %v, p99 %v", kills, c.acked.Load(), c.unanswered,
		len(c.keys), benchtest.Percentile(restarts, 50).Round(time.Millisecond), benchtest.Percentile(restarts, 99).Round(time.Millisecond))
}

// churnKey is a key and its state according to the server's responses.
type churnKey struct {
	key  string
	info *adminv1.Key // as it was when the key was created
	// The key must be refused.
	revoked bool
	// A call that would have revoked the key had no response.
	uncertain bool
	// The key was rotated. It remains valid for its grace period and cannot be rotated again.
	replaced bool
}

// churn creates, rotates and revokes keys, and records which changes were acknowledged.
type churn struct {
	s          *server
	seed       uint64
	generators uint64       // the number of generators that generator has returned
	rnd        *rand.Rand   // for the goroutine of the test
	acked      atomic.Int64 // the number of calls that were acknowledged
	killing    atomic.Bool  // the server of this round is being killed

	mu   sync.Mutex
	keys map[string]*churnKey // by id
	ids  []string             // the keys of the map, in the order of their creation
	// changed are the ids of the keys that changed since the last comparison.
	changed []string
	// unanswered counts the calls without a response that may have created a key.
	unanswered int
}

// generator returns a random number generator for one goroutine.
func (c *churn) generator() *rand.Rand {
	c.generators++
	return rand.New(rand.NewPCG(c.seed, c.generators))
}

// fill creates the keys that exist before the first kill.
func (c *churn) fill(t *testing.T, keys int) {
	t.Helper()
	a := c.s.admin(t)
	const workers = 64
	var g errgroup.Group
	for worker := range workers {
		rnd := c.generator()
		g.Go(func() error {
			for n := worker; n < keys; n += workers {
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

// round changes keys until the server has acknowledged the given number of calls. It then kills the server while other
// calls are in progress.
func (c *churn) round(t *testing.T, calls int) {
	t.Helper()
	a := c.s.admin(t)
	defer a.Close()
	workerIDs := make([][]string, churnWorkers) // each worker changes its own keys only
	for _, id := range c.shuffled() {
		k := c.keys[id]
		if n := c.rnd.IntN(churnWorkers); !k.revoked && !k.replaced && len(workerIDs[n]) < calls {
			workerIDs[n] = append(workerIDs[n], id)
		}
	}
	c.killing.Store(false)
	killAt := c.acked.Load() + int64(calls)
	var g errgroup.Group
	for _, ids := range workerIDs {
		rnd := c.generator()
		g.Go(func() error {
			for {
				err := c.call(t.Context(), a, rnd, &ids)
				if err == nil && c.acked.Add(1) >= killAt && c.killing.CompareAndSwap(false, true) {
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

// call makes one random call: it creates a key, or rotates, revokes or reads one of ids. It removes rotated and revoked
// keys from ids.
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
			return fmt.Errorf("key %s is %v, but was not revoked", id, k)
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
		old.uncertain = req.Grace == ""
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
		c.keys[id].uncertain = true
		return err
	}
	c.keys[id].revoked = true
	// A revoked key is refused at once, not only after a restart.
	if ok, err := c.s.accepts(c.keys[id].key); ok && err == nil {
		return fmt.Errorf("key %s is accepted after it was revoked", id)
	}
	return nil
}

func (c *churn) add(key string, info *adminv1.Key) {
	c.keys[info.GetId()] = &churnKey{key: key, info: info}
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
	c.checkAccepted(t, check)
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
		t.Errorf("the server lists %d keys that no acknowledged call created; only %d calls had no response", extra, c.unanswered)
	}
	c.checkAccepted(t, c.sample(50))
	audit, err := a.VerifyAudit(t.Context())
	if err != nil || audit.GetProblem() != "" || audit.GetEntries() < uint64(len(c.keys)) {
		t.Errorf("audit log: %v, error %v, want an intact log with at least %d entries", audit, err, len(c.keys))
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
	if k.uncertain {
		k.revoked, k.uncertain = revoked, false // both are correct, but the state must not change again
	}
	if revoked != k.revoked || got.GetName() != k.info.GetName() || !slices.Equal(got.GetNamespaces(), k.info.GetNamespaces()) ||
		!got.GetExpiresAt().AsTime().Equal(k.info.GetExpiresAt().AsTime()) {
		t.Errorf("key %s, created as %v, is %v; want revoked: %t", id, k.info, got, k.revoked)
	}
}

// sample returns the ids of the keys that changed since its last call, and the ids of others random keys.
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

// checkAccepted sends a request with each key, and checks that the revoked ones are refused and the others accepted.
func (c *churn) checkAccepted(t *testing.T, ids []string) {
	t.Helper()
	var g errgroup.Group
	g.SetLimit(16)
	for _, id := range ids {
		g.Go(func() error {
			if ok, err := c.s.accepts(c.keys[id].key); err != nil || ok == c.keys[id].revoked {
				return fmt.Errorf("key %s: accepted: %t, error %v; revoked: %t", id, ok, err, c.keys[id].revoked)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// admin returns a new client of the admin socket. The test closes it at its end.
func (s *server) admin(t testing.TB) *client.Admin {
	a := &client.Admin{Socket: filepath.Join(s.runDir, "msbd.sock")}
	t.Cleanup(func() { a.Close() })
	return a
}

// randomSourceClient sends each request from a random loopback address, because the server limits bad keys per client
// address.
var randomSourceClient = &http.Client{Transport: &http.Transport{
	DisableKeepAlives: true,
	DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, byte(1+rand.IntN(254)), byte(rand.IntN(255)), byte(1+rand.IntN(254)))}}
		return d.DialContext(ctx, network, address)
	},
}}

// accepts reports whether the server accepts a key. An error means that this is not known.
func (s *server) accepts(key string) (bool, error) {
	body := strings.NewReader(`{"jsonrpc": "2.0", "id": 1, "method": "sandbox.metrics.get", "params": {"namespace": "*"}}`)
	req, err := http.NewRequest(http.MethodPost, "http://"+s.address+"/api/v1/rpc", body)
	if err != nil {
		return false, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+key)
	res, err := randomSourceClient.Do(req)
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
		return false, fmt.Errorf("the key is neither accepted nor refused: %s", res.Status)
	}
}

// TestKillsUnderSandboxChurn kills the server at random moments while sandboxes are started and stopped, and checks
// that every start and stop that the server acknowledged holds after the restart.
func TestKillsUnderSandboxChurn(t *testing.T) {
	parallel(t)
	s, key := pythonServer(t)
	names := []string{"even", "odd"}
	rnd := randtest.New(t)
	// The state of each sandbox according to the server's responses: running, stopped, or "" after a call without a
	// response.
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
		time.Sleep(time.Duration(rnd.Int64N(int64(patience * 8 * time.Second)))) // a start takes half of this
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
			// After a call without a response, the sandbox may be running or stopped, or its start may have failed.
			if known := state[name]; known != "" && runs != (known == "running") {
				t.Errorf("kill %d: sandbox %s was acknowledged as %s, but a command in it returned %v", kill, name, known, a)
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
