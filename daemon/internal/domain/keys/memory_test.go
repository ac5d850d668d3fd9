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

// Memory is keystest.MemoryStore, as far as the tests of this package use it. They cannot import keystest,
// which imports this package: store_test.go, which is outside of the package, sets NewMemory.
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

// actions returns the events of the log as "action target", and forgets them.
func actions(store Memory) (actions []string) {
	for _, e := range store.TakeEvents() {
		actions = append(actions, e.Action+" "+e.Target)
	}
	return actions
}

// from is where the requests of tests come from.
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

func accepted(t testing.TB, v *Verifier, token string) Principal {
	t.Helper()
	p, err := v.Verify(token, from)
	if err != nil || p.KeyID == "" {
		t.Errorf("%.60q is refused: %+v, %v", token, p, err)
	}
	return p
}

// refused fails unless the token is refused with the one error; it returns the cause for the log.
func refused(t testing.TB, v *Verifier, token string) (cause string) {
	t.Helper()
	p, err := v.Verify(token, from)
	if !errdefs.IsUnauthorized(err) || p.KeyID != "" || p.Allows("default") || p.Has(ScopeRead) {
		t.Errorf("%.60q speaks for %+v, %v", token, p, err)
		return ""
	}
	if err.Error() != errForm.Error() {
		t.Errorf("%.60q: the text %q gives its cause away", token, err)
	}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("", "err", err)
	return log.String()
}

// manualClock is a clock that tests set.
type manualClock struct {
	mu           sync.Mutex
	wall, steady time.Time
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

// pass lets time pass; set sets the wall clock.
func (c *manualClock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wall, c.steady = c.wall.Add(d), c.steady.Add(d)
}

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

// count is how often a test tries what chance decides: few times, or with MSB_SOAK=1 full ones.
func count(t testing.TB, few, full int) int {
	t.Helper()
	n := few
	switch {
	case os.Getenv("MSB_SOAK") == "1":
		n = full
	case testing.Short():
		n = max(1, few/10)
	}
	t.Logf("%d times (of %d; MSB_SOAK=1 for all)", n, full)
	return n
}
