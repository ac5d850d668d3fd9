package keys

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/audit"
)

// Memory is the part of keystest.MemoryStore that the tests of this package use. They cannot import keystest, because
// keystest imports this package. Instead, store_test.go, which is in package keys_test, sets NewMemory.
type Memory interface {
	Store
	FailWith(error)
	FailIf(func(Change) error)
	Records() map[string]Record
	SetRecords(map[string]Record)
	Used() (usage map[string]Usage, latest time.Time)
	Events() []audit.Event
	TakeEvents() []audit.Event
}

// NewMemory returns an empty Memory.
var NewMemory func() Memory

// actions returns the logged events in the form "action target", and removes them from the store.
func actions(store Memory) (actions []string) {
	for _, e := range store.TakeEvents() {
		actions = append(actions, e.Action+" "+e.Target)
	}
	return actions
}

// from is the address that the requests in tests come from.
var from = netip.MustParseAddr("192.0.2.1")

func newIssuer(t testing.TB) (Memory, *Issuer, *Verifier) {
	t.Helper()
	store := NewMemory()
	i, v := openIssuer(t, store, keyringPath(t))
	return store, i, v
}

func keyringPath(t testing.TB) string { return filepath.Join(t.TempDir(), "state", "keyring.json") }

func openIssuer(t testing.TB, store Store, path string) (*Issuer, *Verifier) {
	t.Helper()
	return openWith(t, options(store, path))
}

func options(store Store, path string) Options {
	return Options{KeyringPath: path, Store: store, Log: slog.New(slog.DiscardHandler)}
}

func openWith(t testing.TB, opts Options) (*Issuer, *Verifier) {
	t.Helper()
	i, v, err := Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	return i, v
}

func issue(t testing.TB, i *Issuer, req IssueRequest) (string, Record) {
	t.Helper()
	secret, r, err := i.Issue(context.Background(), req)
	if err != nil {
		t.Fatal(err)
	}
	return secret.Reveal(), r
}

func revoke(t testing.TB, i *Issuer, ref string) Key {
	t.Helper()
	k, err := i.Revoke(context.Background(), ref, 0)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// accepted checks that the token is accepted, and returns its principal.
func accepted(t testing.TB, v *Verifier, token string) Principal {
	t.Helper()
	p, err := v.Verify(token, from)
	if err != nil || p.KeyID == "" {
		t.Errorf("%.60q is refused: %+v, %v", token, p, err)
	}
	return p
}

// refused checks that the token is refused, with an error message that does not reveal the cause. It returns what slog
// logs for the error, which includes the cause.
func refused(t testing.TB, v *Verifier, token string) (cause string) {
	t.Helper()
	p, err := v.Verify(token, from)
	if !errdefs.IsUnauthorized(err) || p.KeyID != "" || p.Allows("default") || p.Has(ScopeRead) {
		t.Errorf("%.60q is not refused: %+v, %v", token, p, err)
		return ""
	}
	if err.Error() != errForm.Error() {
		t.Errorf("%.60q: the message %q reveals the cause", token, err)
	}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("", "err", err)
	return log.String()
}

// manualClock is a clock that a test controls.
type manualClock struct {
	mu           sync.Mutex
	wall, steady time.Time
	asleep       time.Duration
}

func newManualClock(at string) *manualClock {
	t, err := time.Parse(time.RFC3339, at)
	if err != nil {
		panic(err)
	}
	return &manualClock{wall: t, steady: t}
}

func (c *manualClock) read() (wall, steady int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.wall.UnixMicro(), c.steady.UnixMicro()
}

// pass advances both the wall clock and the steady clock by d.
func (c *manualClock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wall, c.steady = c.wall.Add(d), c.steady.Add(d)
}

// suspend suspends the machine for d. Only the wall clock advances.
func (c *manualClock) suspend(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wall, c.asleep = c.wall.Add(d), c.asleep+d
}

// slept returns for how long the machine was suspended, in microseconds.
func (c *manualClock) slept() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asleep.Microseconds()
}

// set sets the wall clock.
func (c *manualClock) set(wall time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wall = wall
}

func (c *manualClock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.wall
}

// iterations returns how many iterations a randomized test runs: normal, a tenth of that with -short, or soak with
// MSB_SOAK=1.
func iterations(t testing.TB, normal, soak int) int {
	t.Helper()
	n := normal
	switch {
	case os.Getenv("MSB_SOAK") == "1":
		n = soak
	case testing.Short():
		n = max(1, normal/10)
	}
	t.Logf("%d iterations (%d with MSB_SOAK=1)", n, soak)
	return n
}
