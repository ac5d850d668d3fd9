package keys

import (
	"bytes"
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/audit"
)

// memory is a Store without a disk.
type memory struct {
	mu      sync.Mutex
	records map[string]Record
	usage   map[string]Usage
	latest  time.Time
	events  []audit.Event
	saves   int
	// fail, if it is set, is asked before each change and each save of usage (the empty Change).
	fail func(Change) error
}

func newMemory() *memory {
	return &memory{records: make(map[string]Record), usage: make(map[string]Usage)}
}

func (m *memory) LoadKeys() (Saved, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return Saved{Records: slices.Collect(maps.Values(m.records)), Usage: maps.Clone(m.usage), Latest: m.latest}, nil
}

func (m *memory) CommitKeys(c Change) error {
	if err := m.mayFail(c); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range c.Put {
		m.records[r.ID] = r
	}
	for _, id := range c.Delete {
		delete(m.records, id)
		delete(m.usage, id)
	}
	if !c.Clock.IsZero() {
		m.latest = c.Clock
	}
	m.events = append(m.events, c.Events...)
	return nil
}

func (m *memory) SaveUsage(usage map[string]Usage, latest time.Time) error {
	if err := m.mayFail(Change{}); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.saves++
	for id, u := range usage {
		if _, ok := m.records[id]; ok {
			m.usage[id] = u
		}
	}
	if latest.After(m.latest) {
		m.latest = latest
	}
	return nil
}

func (m *memory) mayFail(c Change) error {
	m.mu.Lock()
	fail := m.fail
	m.mu.Unlock()
	if fail == nil {
		return nil
	}
	return fail(c) // without the lock: it may wait for another change
}

// failWith makes every change fail with err from now on; nil: none.
func (m *memory) failWith(err error) {
	m.failIf(func(Change) error { return err })
}

func (m *memory) failIf(fail func(Change) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = fail
}

func (m *memory) record(id string) Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.records[id]
}

// used returns what was saved last.
func (m *memory) used() (usage map[string]Usage, latest time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.usage), m.latest
}

// actions returns the events of the log as "action target", and forgets them.
func (m *memory) actions() (actions []string) {
	for _, e := range m.drain() {
		actions = append(actions, e.Action+" "+e.Target)
	}
	return actions
}

func (m *memory) drain() []audit.Event {
	m.mu.Lock()
	defer m.mu.Unlock()
	events := m.events
	m.events = nil
	return events
}

// from is where the requests of tests come from.
var from = netip.MustParseAddr("192.0.2.1")

func newIssuer(t testing.TB) (*memory, *Issuer, *Verifier) {
	t.Helper()
	store := newMemory()
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
