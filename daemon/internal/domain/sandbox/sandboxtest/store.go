package sandboxtest

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// MemoryStore is an in-memory sandbox.Store. It is safe for concurrent use.
type MemoryStore struct {
	mu      sync.Mutex
	records map[string]sandbox.Record
	pools   map[sandbox.Template]sandbox.PoolSize
	fail    error
}

var _ sandbox.Store = (*MemoryStore)(nil)

// NewMemoryStore returns a MemoryStore that holds records.
func NewMemoryStore(records ...sandbox.Record) *MemoryStore {
	m := &MemoryStore{records: make(map[string]sandbox.Record), pools: make(map[sandbox.Template]sandbox.PoolSize)}
	for _, r := range records {
		m.records[r.ID] = r
	}
	return m
}

// PutSandbox implements sandbox.Store.
func (m *MemoryStore) PutSandbox(r sandbox.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return m.fail
	}
	if r.ID == "" {
		return fmt.Errorf("the record has no id: %w", errdefs.ErrInvalidArgument)
	}
	m.records[r.ID] = r
	return nil
}

// DeleteSandbox implements sandbox.Store.
func (m *MemoryStore) DeleteSandbox(id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return m.fail
	}
	delete(m.records, id)
	return nil
}

// Sandboxes implements sandbox.Store.
func (m *MemoryStore) Sandboxes() ([]sandbox.Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.records)), nil
}

// PutPool implements sandbox.Store.
func (m *MemoryStore) PutPool(p sandbox.PoolSize) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail == nil {
		m.pools[p.Template] = p
	}
	return m.fail
}

// DeletePool implements sandbox.Store.
func (m *MemoryStore) DeletePool(t sandbox.Template) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail == nil {
		delete(m.pools, t)
	}
	return m.fail
}

// Pools implements sandbox.Store.
func (m *MemoryStore) Pools() ([]sandbox.PoolSize, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.pools)), nil
}

// FailWith makes all further changes fail with err. If err is nil, changes succeed again.
func (m *MemoryStore) FailWith(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail = err
}

// Records returns all records by id.
func (m *MemoryStore) Records() map[string]sandbox.Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.records)
}

// TestStore checks the contract of sandbox.Store. open returns an empty store. reopen closes a store and opens it again, like
// a restart of the server; it is nil if the implementation is not persistent.
func TestStore(t *testing.T, open func(t *testing.T) sandbox.Store, reopen func(t *testing.T, s sandbox.Store) sandbox.Store) {
	if reopen == nil {
		reopen = func(_ *testing.T, s sandbox.Store) sandbox.Store { return s }
	}
	for name, test := range map[string]func(t *testing.T, s *storeUnderTest){
		"records":               testRecords,
		"a record without id":   testRecordWithoutID,
		"concurrent operations": testConcurrentChanges,
		"pools":                 testPools,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, &storeUnderTest{Store: open(t), reopen: reopen})
		})
	}
}

type storeUnderTest struct {
	sandbox.Store
	reopen func(t *testing.T, s sandbox.Store) sandbox.Store
}

// wantRecords checks that the store has exactly these records, now and after a restart.
func (s *storeUnderTest) wantRecords(t *testing.T, want ...sandbox.Record) {
	t.Helper()
	byID := cmpopts.SortSlices(func(a, b sandbox.Record) bool { return a.ID < b.ID })
	for _, when := range []string{"now", "after a restart"} {
		got, err := s.Sandboxes()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, byID, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("records %s (-want +got):\n%s", when, diff)
		}
		s.Store = s.reopen(t, s.Store)
	}
}

func (s *storeUnderTest) put(t *testing.T, records ...sandbox.Record) {
	t.Helper()
	for _, r := range records {
		if err := s.PutSandbox(r); err != nil {
			t.Fatal(err)
		}
	}
}

func storedRecord(id string, state sandbox.State) sandbox.Record {
	return sandbox.Record{
		ID:     id,
		Name:   sandbox.Name{Namespace: "default", Name: "sandbox-" + id},
		Config: sandbox.Config{Template: sandbox.Template{Image: "microsandbox/python", CPUs: 1, MemoryMiB: 512, DiskMiB: 4096}, Binding: sandbox.Binding{Env: []string{"A=b"}, Workdir: "/w", User: "app", Hostname: "web"}},
		State:  state, Origin: sandbox.Origin{From: sandbox.Cold, Why: "no pool"}, CPUNanos: 12, Digest: "sha256:00",
		CreatedAt: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
	}
}

func testRecords(t *testing.T, s *storeUnderTest) {
	s.wantRecords(t)
	s.put(t, storedRecord("0", sandbox.Starting), storedRecord("1", sandbox.Starting))
	s.wantRecords(t, storedRecord("0", sandbox.Starting), storedRecord("1", sandbox.Starting))
	failed := storedRecord("1", sandbox.Failed)
	failed.Reason, failed.Cause = "it did not start", "no disk"
	s.put(t, storedRecord("0", sandbox.Running), failed)
	s.wantRecords(t, storedRecord("0", sandbox.Running), failed)
	for range 2 { // deleting an unknown id, as in the second round, is not an error
		if err := s.DeleteSandbox("0"); err != nil {
			t.Fatal(err)
		}
		s.wantRecords(t, failed)
	}
}

func testPools(t *testing.T, s *storeUnderTest) {
	want := func(want ...sandbox.PoolSize) {
		t.Helper()
		for _, when := range []string{"now", "after a restart"} {
			got, err := s.Pools()
			if err != nil {
				t.Fatal(err)
			}
			slices.SortFunc(got, func(a, b sandbox.PoolSize) int { return strings.Compare(a.Image, b.Image) })
			if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("pools %s (-want +got):\n%s", when, diff)
			}
			s.Store = s.reopen(t, s.Store)
		}
	}
	want()
	a := sandbox.PoolSize{Template: sandbox.Template{Image: "a", CPUs: 1, MemoryMiB: 512, DiskMiB: 4096}, Min: 1, Max: 4}
	b := sandbox.PoolSize{Template: sandbox.Template{Image: "b", CPUs: 2, MemoryMiB: 512}}
	for _, size := range []sandbox.PoolSize{{Template: a.Template, Min: 7, Max: 7}, a, b} {
		if err := s.PutPool(size); err != nil {
			t.Fatal(err)
		}
	}
	want(a, b)
	for range 2 { // removing an unknown one, as in the second round, is not an error
		if err := s.DeletePool(a.Template); err != nil {
			t.Fatal(err)
		}
		want(b)
	}
	if recs, err := s.Sandboxes(); err != nil || len(recs) > 0 {
		t.Errorf("there are the records %+v, error %v", recs, err)
	}
}

func testRecordWithoutID(t *testing.T, s *storeUnderTest) {
	if err := s.PutSandbox(storedRecord("", sandbox.Starting)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("PutSandbox without an id: got error %v, want InvalidArgument", err)
	}
	s.wantRecords(t)
}

// Concurrent changes are all applied.
func testConcurrentChanges(t *testing.T, s *storeUnderTest) {
	var want []sandbox.Record
	var wg sync.WaitGroup
	for n := range 8 {
		id := fmt.Sprint(n)
		want = append(want, storedRecord(id, sandbox.Running))
		wg.Go(func() {
			for _, r := range []sandbox.Record{storedRecord(id, sandbox.Starting), storedRecord(id+"-gone", sandbox.Starting), storedRecord(id, sandbox.Running)} {
				if err := s.PutSandbox(r); err != nil {
					t.Error(err)
				}
			}
			if err := s.DeleteSandbox(id + "-gone"); err != nil {
				t.Error(err)
			}
			if _, err := s.Sandboxes(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	s.wantRecords(t, want...)
}
