package store

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"

	"github.com/msbd/msbd/daemon/internal/sandbox"
	"github.com/msbd/msbd/daemon/internal/token"
)

func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func reopen(t testing.TB, s *Store, dir string) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, dir)
}

func keyRecord(id, signingKeyID string) token.Record {
	at := time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)
	return token.Record{
		ID: id, Namespace: "team-alpha", Scopes: []string{"sandbox:read"}, CreatedAt: at, CreatedBy: 1000,
		ExpiresAt: at.Add(time.Hour), SigningKeyID: signingKeyID,
	}
}

func TestKeysSurviveReopening(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	forever := token.Record{ID: "b", CreatedAt: time.Unix(0, 0).UTC(), SigningKeyID: "k1"}
	want := []token.Record{keyRecord("a", "k1"), forever}
	for _, r := range want {
		if err := s.AddKey(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.AddKey(forever); !errdefs.IsAlreadyExists(err) {
		t.Errorf("AddKey of a taken id: %v, want already exists", err)
	}
	got, err := reopen(t, s, dir).Keys()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestRevokeKeysNotSignedBy(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	at := time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)
	earlier := keyRecord("revoked-before", "old")
	earlier.RevokedAt = at.Add(-time.Hour)
	for _, r := range []token.Record{keyRecord("old", "old"), keyRecord("new", "new"), earlier} {
		if err := s.AddKey(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.RevokeKeysNotSignedBy("new", at); err != nil {
		t.Fatal(err)
	}
	records, err := reopen(t, s, dir).Keys()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]time.Time{}
	for _, r := range records {
		got[r.ID] = r.RevokedAt
	}
	want := map[string]time.Time{"old": at, "new": {}, "revoked-before": earlier.RevokedAt}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestSandboxesSurviveReopening(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	r := sandbox.Record{
		ID:        "0123",
		Name:      sandbox.Name{Namespace: "default", Name: "my-env"},
		Config:    sandbox.Config{Image: "microsandbox/python", CPUs: 1, MemoryMiB: 512, Env: []string{"A=b"}},
		State:     sandbox.Starting,
		CreatedAt: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
	}
	gone := r
	gone.ID = "4567"
	for _, put := range []sandbox.Record{r, gone} {
		if err := s.PutSandbox(put); err != nil {
			t.Fatal(err)
		}
	}
	r.State = sandbox.Running
	if err := s.PutSandbox(r); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second is of an unknown id
		if err := s.DeleteSandbox(gone.ID); err != nil {
			t.Fatal(err)
		}
	}
	got, err := reopen(t, s, dir).Sandboxes()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]sandbox.Record{r}, got); diff != "" {
		t.Error(diff)
	}
}

func TestSecondOpenNamesTheFirst(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	_, err := Open(dir)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "pid "+strconv.Itoa(os.Getpid())) {
		t.Errorf("second Open: %v, want failed precondition with the pid", err)
	}
	reopen(t, s, dir)
}

func TestNewerSchemaIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	update(t, s, func(tx *bbolt.Tx) error { return tx.Bucket(metaBucket).Put(schemaKey, []byte("99")) })
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "newer msbd") {
		t.Errorf("Open: %v, want failed precondition naming a newer msbd", err)
	}
}

func update(t testing.TB, s *Store, fn func(*bbolt.Tx) error) {
	t.Helper()
	if err := s.db.Update(fn); err != nil {
		t.Fatal(err)
	}
}

// A damaged store is refused and stays as it is.
func TestDamageIsRefused(t *testing.T) {
	record := func(value string) func(t *testing.T, s *Store, path string) {
		return func(t *testing.T, s *Store, path string) {
			update(t, s, func(tx *bbolt.Tx) error { return tx.Bucket(keyBucket).Put([]byte("a"), []byte(value)) })
		}
	}
	file := func(change func(data []byte) []byte) func(t *testing.T, s *Store, path string) {
		return func(t *testing.T, s *Store, path string) {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, change(data), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	tests := map[string]func(t *testing.T, s *Store, path string){
		"unknown member":   record(`{"id":"a","created_at":"2026-01-02T03:04:05Z","created_by":0,"signing_key_id":"k","extra":1}`),
		"duplicate member": record(`{"id":"a","id":"a","created_at":"2026-01-02T03:04:05Z","created_by":0,"signing_key_id":"k"}`),
		"other id":         record(`{"id":"b","created_at":"2026-01-02T03:04:05Z","created_by":0,"signing_key_id":"k"}`),
		"not JSON":         record("\x00"),
		"bucket gone": func(t *testing.T, s *Store, path string) {
			update(t, s, func(tx *bbolt.Tx) error { return tx.DeleteBucket(sandboxBucket) })
		},
		"no schema version": func(t *testing.T, s *Store, path string) {
			update(t, s, func(tx *bbolt.Tx) error { return tx.DeleteBucket(metaBucket) })
		},
		"empty file": file(func([]byte) []byte { return nil }),
		"garbage":    file(func(d []byte) []byte { return []byte(strings.Repeat("garbage!", len(d)/8)) }),
		"truncated":  file(func(d []byte) []byte { return d[:3*os.Getpagesize()] }),
		"zeroed pages": file(func(d []byte) []byte {
			clear(d[2*os.Getpagesize():])
			return d
		}),
	}
	for name, damage := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, fileName)
			s := open(t, dir)
			for i := range 200 {
				if err := s.AddKey(keyRecord(fmt.Sprintf("key-%d", i), "k1")); err != nil {
					t.Fatal(err)
				}
			}
			damage(t, s, path)
			_ = s.Close()
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Open(dir); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), path) {
				t.Errorf("Open: %v, want data loss naming the file", err)
			}
			after, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(before, after) {
				t.Error("the damaged file was changed")
			}
		})
	}
}

// Beside one bbolt commit: a single client may wait little longer, and many share commits.
func BenchmarkAddKey(b *testing.B) {
	var serial atomic.Int64
	id := func() string { return strconv.FormatInt(serial.Add(1), 16) }
	b.Run("bbolt commit", func(b *testing.B) {
		db, err := bbolt.Open(filepath.Join(b.TempDir(), "db"), 0o600, nil)
		if err != nil {
			b.Fatal(err)
		}
		defer db.Close()
		value, err := encode(keyBucket, "x", keyRecord("x", "k"))
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			err := db.Update(func(tx *bbolt.Tx) error {
				bucket, err := tx.CreateBucketIfNotExists(keyBucket)
				if err != nil {
					return err
				}
				return bucket.Put([]byte(id()), value)
			})
			if err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("1 client", func(b *testing.B) {
		s := open(b, b.TempDir())
		for b.Loop() {
			if err := s.AddKey(keyRecord(id(), "k")); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("64 clients", func(b *testing.B) {
		s := open(b, b.TempDir())
		b.SetParallelism(max(1, 64/runtime.GOMAXPROCS(0)))
		b.ResetTimer()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if err := s.AddKey(keyRecord(id(), "k")); err != nil {
					b.Error(err)
					return
				}
			}
		})
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "keys/s")
	})
}
