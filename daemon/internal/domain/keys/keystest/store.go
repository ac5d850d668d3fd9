package keystest

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// TestStore tests that an implementation fulfills the contract of keys.Store. open returns an empty store. reopen closes
// a store and opens it again, like a restart of the server. reopen must be nil if the implementation does not persist
// anything.
func TestStore(t *testing.T, open func(t *testing.T) keys.Store, reopen func(t *testing.T, s keys.Store) keys.Store) {
	if reopen == nil {
		reopen = func(_ *testing.T, s keys.Store) keys.Store { return s }
	}
	for name, test := range map[string]func(t *testing.T, s *storeUnderTest){
		"empty":              testEmpty,
		"records":            testRecords,
		"usage":              testUsage,
		"replacement":        testReplacement,
		"latest time":        testLatest,
		"atomic changes":     testAtomicity,
		"concurrent changes": testConcurrency,
		"LoadKeys copies":    testLoadReturnsCopy,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, &storeUnderTest{Store: open(t), reopen: reopen})
		})
	}
}

type storeUnderTest struct {
	keys.Store
	reopen func(t *testing.T, s keys.Store) keys.Store
}

func (s *storeUnderTest) commit(t *testing.T, c keys.Change) {
	t.Helper()
	if err := s.CommitKeys(c); err != nil {
		t.Fatal(err)
	}
}

func (s *storeUnderTest) save(t *testing.T, usage map[string]keys.Usage, latest time.Time) {
	t.Helper()
	if err := s.SaveUsage(usage, latest); err != nil {
		t.Fatal(err)
	}
}

// wantSaved checks the contents of the store, before and after a restart.
func (s *storeUnderTest) wantSaved(t *testing.T, want keys.Saved) {
	t.Helper()
	equal := cmp.Options{
		cmpopts.EquateEmpty(), cmpopts.SortSlices(func(a, b keys.Record) bool { return a.ID < b.ID }),
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(time.Time.Equal),
	}
	for _, when := range []string{"before a restart", "after a restart"} {
		got, err := s.LoadKeys()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, equal); diff != "" {
			t.Errorf("%s, the contents of the store differ (-want +got):\n%s", when, diff)
		}
		s.Store = s.reopen(t, s.Store)
	}
}

var moment = time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)

func record(id string) keys.Record {
	return keys.Record{
		ID: id, Name: "ci-" + id, Namespaces: []string{"team-alpha", "team-beta"}, Scopes: []keys.Scope{keys.ScopeRead},
		CreatedAt: moment, CreatedBy: 1000, Life: "1h", ExpiresAt: moment.Add(time.Hour), SigningKeyID: "k1",
	}
}

func revoked(r keys.Record) keys.Record {
	r.RevokedAt, r.Revocation, r.ReplacedBy = moment, keys.ByRotation, "other"
	return r
}

func created(id string) audit.Event {
	return audit.Event{Action: audit.KeyCreate, Actor: audit.ActorUID(1000), Target: id}
}

func testEmpty(t *testing.T, s *storeUnderTest) {
	s.wantSaved(t, keys.Saved{})
	s.commit(t, keys.Change{})
	s.wantSaved(t, keys.Saved{})
}

func testRecords(t *testing.T, s *storeUnderTest) {
	unlimited := keys.Record{ID: "b", CreatedAt: time.Unix(0, 0).UTC(), SigningKeyID: "k1"}
	s.commit(t, keys.Change{Put: []keys.Record{record("a"), unlimited, record("c")}, Events: []audit.Event{created("a")}})
	s.wantSaved(t, keys.Saved{Records: []keys.Record{record("a"), unlimited, record("c")}})
	s.commit(t, keys.Change{Put: []keys.Record{revoked(record("a")), record("d")}, Delete: []string{"c", "never-was"}})
	s.wantSaved(t, keys.Saved{Records: []keys.Record{revoked(record("a")), unlimited, record("d")}})
	s.commit(t, keys.Change{Delete: []string{"a", "b", "d"}})
	s.wantSaved(t, keys.Saved{})
}

func testUsage(t *testing.T, s *storeUnderTest) {
	s.commit(t, keys.Change{Put: []keys.Record{record("a"), record("b"), record("c")}})
	use := keys.Usage{Requests: 7, LastUsedAt: moment, LastUsedFrom: netip.MustParseAddr("2001:db8::1")}
	s.save(t, map[string]keys.Usage{"a": {Requests: 1}, "b": use, "never-was": use}, moment)
	s.save(t, map[string]keys.Usage{"a": use}, moment)
	s.commit(t, keys.Change{Put: []keys.Record{revoked(record("a"))}, Delete: []string{"b"}})
	s.wantSaved(t, keys.Saved{
		Records: []keys.Record{revoked(record("a")), record("c")}, Usage: map[string]keys.Usage{"a": use}, Latest: moment,
	})
	s.commit(t, keys.Change{Put: []keys.Record{record("b")}}) // its usage was deleted with the earlier record
	s.wantSaved(t, keys.Saved{
		Records: []keys.Record{revoked(record("a")), record("b"), record("c")}, Usage: map[string]keys.Usage{"a": use}, Latest: moment,
	})
}

// A change that both deletes and adds a record replaces it, without its usage.
func testReplacement(t *testing.T, s *storeUnderTest) {
	s.commit(t, keys.Change{Put: []keys.Record{record("a"), record("b")}})
	s.save(t, map[string]keys.Usage{"a": {Requests: 1}, "b": {Requests: 2}}, moment)
	s.commit(t, keys.Change{Delete: []string{"a"}, Put: []keys.Record{revoked(record("a")), revoked(record("b"))}})
	s.wantSaved(t, keys.Saved{
		Records: []keys.Record{revoked(record("a")), revoked(record("b"))}, Usage: map[string]keys.Usage{"b": {Requests: 2}}, Latest: moment,
	})
}

// SaveUsage moves the latest time only forward. Only Change.Clock can set it back.
func testLatest(t *testing.T, s *storeUnderTest) {
	s.save(t, nil, moment)
	s.save(t, nil, moment.Add(-time.Hour))
	s.wantSaved(t, keys.Saved{Latest: moment})
	s.commit(t, keys.Change{Put: []keys.Record{record("a")}})
	s.wantSaved(t, keys.Saved{Records: []keys.Record{record("a")}, Latest: moment})
	s.commit(t, keys.Change{Clock: moment.Add(-time.Hour)})
	s.wantSaved(t, keys.Saved{Records: []keys.Record{record("a")}, Latest: moment.Add(-time.Hour)})
	s.save(t, nil, moment)
	s.wantSaved(t, keys.Saved{Records: []keys.Record{record("a")}, Latest: moment})
}

// If one part of a change is refused, nothing is changed.
func testAtomicity(t *testing.T, s *storeUnderTest) {
	s.commit(t, keys.Change{Put: []keys.Record{record("a")}})
	tooLong := audit.Event{Action: audit.KeyCreate, Target: strings.Repeat("x", audit.MaxLine)}
	for name, c := range map[string]keys.Change{
		"a record without an id":    {Put: []keys.Record{record("b"), {}}},
		"an event that is too long": {Put: []keys.Record{record("b")}, Events: []audit.Event{created("b"), tooLong}},
	} {
		c.Delete, c.Clock = []string{"a"}, moment
		if err := s.CommitKeys(c); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want invalid argument", name, err)
		}
		s.wantSaved(t, keys.Saved{Records: []keys.Record{record("a")}})
	}
}

// Concurrent changes are all made. If one of them is refused, the others are not affected.
func testConcurrency(t *testing.T, s *storeUnderTest) {
	const writers, each = 8, 5
	var want keys.Saved
	var wg sync.WaitGroup
	for n := range writers {
		for i := range each {
			want.Records = append(want.Records, record(fmt.Sprintf("%d-%d", n, i)))
		}
		wg.Go(func() {
			for i := range each {
				id := fmt.Sprintf("%d-%d", n, i)
				if err := s.CommitKeys(keys.Change{Put: []keys.Record{record(id)}, Events: []audit.Event{created(id)}}); err != nil {
					t.Error(err)
				}
				if err := s.CommitKeys(keys.Change{Put: []keys.Record{{}}}); !errdefs.IsInvalidArgument(err) {
					t.Errorf("a record without an id: %v", err)
				}
				if _, err := s.LoadKeys(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	s.wantSaved(t, want)
}

// A caller may modify what LoadKeys returned.
func testLoadReturnsCopy(t *testing.T, s *storeUnderTest) {
	s.commit(t, keys.Change{Put: []keys.Record{record("a")}})
	s.save(t, map[string]keys.Usage{"a": {Requests: 1}}, moment)
	saved, err := s.LoadKeys()
	if err != nil {
		t.Fatal(err)
	}
	saved.Records[0].Name = "changed"
	saved.Usage["a"], saved.Usage["b"] = keys.Usage{}, keys.Usage{}
	s.wantSaved(t, keys.Saved{Records: []keys.Record{record("a")}, Usage: map[string]keys.Usage{"a": {Requests: 1}}, Latest: moment})
}
