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

	"golang.org/x/sync/errgroup"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

const (
	churnKeys    = 10_000 // before the first kill
	churnWorkers = 4
)

// TestKillsUnderKeyChurn kills the server at random moments while keys are made, rotated and revoked, and
// holds it to every answer that it gave. With MSB_SOAK=1 it does so 10,000 times.
func TestKillsUnderKeyChurn(t *testing.T) {
	kills := 200
	if os.Getenv("MSB_SOAK") != "" {
		kills = 10_000
	}
	s := testServer(t)
	c := &churn{s: s, keys: map[string]*churned{}}
	c.fill(t)

	var restarts []time.Duration
	for kill := range kills {
		if kill%5 == 4 { // now and then it is while the server starts
			s.kill()
			if err := s.launch(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(rand.N(patience * 500 * time.Millisecond))
		} else {
			c.round(t, rand.IntN(40))
		}
		s.kill()
		began := time.Now()
		if err := s.start(); err != nil {
			t.Fatalf("kill %d: %v", kill, err)
		}
		restarts = append(restarts, time.Since(began))
		c.verify(t, 50)
		if t.Failed() {
			t.Fatalf("after kill %d", kill)
		}
	}
	c.verify(t, len(c.keys))
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
	s       *server
	acked   atomic.Int64
	killing atomic.Bool

	mu   sync.Mutex
	keys map[string]*churned // by id
	// changed are the ids of this round's.
	changed []string
	// unanswered calls may each have made a key that nobody has.
	unanswered int
}

func (c *churn) fill(t *testing.T) {
	t.Helper()
	a := c.s.admin(t)
	var g errgroup.Group
	g.SetLimit(64)
	for range churnKeys {
		g.Go(func() error { return c.create(t.Context(), a) })
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
	for id, k := range c.keys {
		if n := rand.IntN(churnWorkers); !k.revoked && !k.replaced && len(own[n]) < calls {
			own[n] = append(own[n], id)
		}
	}
	c.killing.Store(false)
	until := c.acked.Load() + int64(calls)
	var g errgroup.Group
	for _, ids := range own {
		g.Go(func() error {
			for {
				err := c.call(t.Context(), a, &ids)
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
func (c *churn) call(ctx context.Context, a *client.Admin, ids *[]string) error {
	choice := rand.IntN(10)
	if len(*ids) == 0 || choice < 4 {
		return c.create(ctx, a)
	}
	i := rand.IntN(len(*ids))
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
		return c.rotate(ctx, a, id)
	}
	return c.revoke(ctx, a, id)
}

func (c *churn) create(ctx context.Context, a *client.Admin) error {
	req := &adminv1.CreateKeyRequest{}
	if rand.IntN(2) == 0 {
		req.Expire = "1y"
	}
	if rand.IntN(2) == 0 {
		req.Namespaces = []string{"team-alpha", "project-web"}
	}
	if rand.IntN(2) == 0 {
		req.Name = fmt.Sprintf("key-%x", rand.Uint64())
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

func (c *churn) rotate(ctx context.Context, a *client.Admin, id string) error {
	req := &adminv1.RotateKeyRequest{Ref: id}
	if rand.IntN(2) == 0 {
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
	c.changed = append(c.changed, info.GetId())
}

// verify compares the server with what it has acknowledged: all keys in its list, and over HTTP those
// that changed and so many more.
func (c *churn) verify(t *testing.T, more int) {
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
	for id, k := range c.keys {
		got := listed[id]
		if got == nil {
			t.Errorf("key %s is lost", id)
			continue
		}
		extra--
		revoked := got.GetState() == adminv1.KeyState_KEY_STATE_REVOKED
		if k.doubt {
			k.revoked, k.doubt = revoked, false // either is right, from now on for good
		}
		if revoked != k.revoked || got.GetName() != k.info.GetName() || !slices.Equal(got.GetNamespaces(), k.info.GetNamespaces()) ||
			!got.GetExpiresAt().AsTime().Equal(k.info.GetExpiresAt().AsTime()) {
			t.Errorf("key %s, made as %v, is %v; want revoked: %t", id, k.info, got, k.revoked)
		}
	}
	if extra > c.unanswered {
		t.Errorf("%d keys that nobody asked for, after %d calls without an answer", extra, c.unanswered)
	}

	check := c.changed
	for id := range c.keys { // in a random order
		if more--; more < 0 {
			break
		}
		check = append(check, id)
	}
	c.changed = nil
	var g errgroup.Group
	g.SetLimit(16)
	for _, id := range check {
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
	audit, err := a.VerifyAudit(t.Context())
	if err != nil || audit.GetProblem() != "" || audit.GetEntries() < uint64(len(c.keys)) {
		t.Errorf("audit log: %v, %v", audit, err)
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
	s := testServer(t)
	if err := s.importImages("python"); err != nil {
		t.Fatal(err)
	}
	key := s.key(t)
	names := []string{"even", "odd"}
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
		time.Sleep(rand.N(patience * 8 * time.Second)) // starts take half of it
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
