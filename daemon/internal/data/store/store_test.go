package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
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

var moment = time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)

func keyRecord(id string) keys.Record {
	return keys.Record{
		ID: id, Name: "ci-" + id, Namespaces: []string{"team-alpha", "team-beta"}, Scopes: []keys.Scope{keys.ScopeRead},
		CreatedAt: moment, CreatedBy: 1000, Life: "1h", ExpiresAt: moment.Add(time.Hour), SigningKeyID: "k1",
	}
}

// addKey stores a key together with its audit event, as the issuer does.
func addKey(s *Store, r keys.Record) error {
	e := audit.Event{Action: audit.KeyCreate, Actor: audit.ActorUID(r.CreatedBy), Target: r.ID, Detail: map[string]string{"name": r.Name}}
	return s.CommitKeys(keys.Change{Put: []keys.Record{r}, Events: []audit.Event{e}})
}

func commit(t testing.TB, s *Store, c keys.Change) {
	t.Helper()
	if err := s.CommitKeys(c); err != nil {
		t.Fatal(err)
	}
}

func loaded(t testing.TB, s *Store) keys.Saved {
	t.Helper()
	saved, err := s.LoadKeys()
	if err != nil {
		t.Fatal(err)
	}
	return saved
}

func TestBadRecordsAreRefused(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	if err := s.CommitKeys(keys.Change{Put: []keys.Record{keyRecord("a"), {}}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a key without an id: %v, want invalid argument", err)
	}
	long := []audit.Event{{Action: audit.KeyCreate, Target: strings.Repeat("x", audit.MaxLine)}}
	if err := s.CommitKeys(keys.Change{Put: []keys.Record{keyRecord("a")}, Events: long}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an event that is too long: %v, want invalid argument", err)
	}
	if saved := loaded(t, s); len(saved.Records) != 0 || s.AuditHead() != (audit.Head{}) {
		t.Errorf("a refused change was made: %v, %v", saved, s.AuditHead())
	}
	if err := s.Health(); err != nil {
		t.Errorf("Health reports the caller's mistake: %v", err)
	}
}

func TestSecondOpenNamesTheProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	_, err := Open(dir)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "pid "+strconv.Itoa(os.Getpid())) {
		t.Errorf("second Open: %v, want failed precondition with the pid", err)
	}
	reopen(t, s, dir)
}

func TestFilesArePrivate(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a", "b")
	if err := addKey(open(t, dir), keyRecord("a")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{".": 0o700, fileName: 0o600, logName: 0o600} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want %v", name, info.Mode(), err, want)
		}
	}
}

func TestNewerSchemaIsRefused(t *testing.T) {
	t.Parallel()
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

func edit(t testing.TB, path string, change func(data []byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, change(data), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Open refuses a damaged store and does not change its file.
func TestDamageIsRefused(t *testing.T) {
	t.Parallel()
	tx := func(damage func(tx *bbolt.Tx) error) func(t *testing.T, s *Store, path string) {
		return func(t *testing.T, s *Store, path string) { update(t, s, damage) }
	}
	file := func(change func(data []byte) []byte) func(t *testing.T, s *Store, path string) {
		return func(t *testing.T, s *Store, path string) {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			edit(t, path, change)
		}
	}
	put := func(bucket []byte, key string, value []byte) func(t *testing.T, s *Store, path string) {
		return tx(func(tx *bbolt.Tx) error { return tx.Bucket(bucket).Put([]byte(key), value) })
	}
	get := func(tx *bbolt.Tx, bucket []byte, key string) []byte {
		return slices.Clone(tx.Bucket(bucket).Get([]byte(key)))
	}
	// pages changes every page of a type: 1 is a branch, 2 is a leaf, 16 is the list of free pages.
	pages := func(flags uint16, change func(page []byte)) func(t *testing.T, s *Store, path string) {
		return file(func(d []byte) []byte {
			for page := range slices.Chunk(d, os.Getpagesize()) {
				if binary.NativeEndian.Uint16(page[8:]) == flags {
					change(page)
				}
			}
			return d
		})
	}
	set := func(at int, value uint32) func(page []byte) {
		return func(page []byte) { binary.NativeEndian.PutUint32(page[at:], value) }
	}
	tests := map[string]func(t *testing.T, s *Store, path string){
		"one free page too many": pages(16, func(page []byte) {
			binary.NativeEndian.PutUint16(page[10:], binary.NativeEndian.Uint16(page[10:])+1)
		}),
		"page too long":               pages(2, set(12, 1<<31)),
		"key of a leaf too long":      pages(2, set(16+8, 1<<22)),
		"value too long":              pages(2, set(16+12, 1<<22)),
		"key of a branch too long":    pages(1, set(16+4, 1<<22)),
		"empty key of a branch":       pages(1, set(16+4, 0)),
		"key of a branch in a header": pages(1, set(16, 0)),
		"record without checksum":     put(keyBucket, "key-1", []byte(`{"id":"key-1"}`)),
		"record too short":            put(keyBucket, "key-1", []byte("x")),
		"record changed": tx(func(tx *bbolt.Tx) error {
			value := get(tx, keyBucket, "key-1")
			return tx.Bucket(keyBucket).Put([]byte("key-1"), bytes.Replace(value, []byte("team-alpha"), []byte("team-alphb"), 1))
		}),
		"record of another key": tx(func(tx *bbolt.Tx) error {
			return tx.Bucket(keyBucket).Put([]byte("key-1"), get(tx, keyBucket, "key-2"))
		}),
		"usage in place of a key": tx(func(tx *bbolt.Tx) error {
			return tx.Bucket(keyBucket).Put([]byte("key-1"), get(tx, usageBucket, "key-1"))
		}),
		"earlier version of a record": func(t *testing.T, s *Store, path string) {
			var before []byte
			update(t, s, func(tx *bbolt.Tx) error {
				before = get(tx, keyBucket, "key-1")
				return nil
			})
			revoked := keyRecord("key-1")
			revoked.RevokedAt = moment
			commit(t, s, keys.Change{Put: []keys.Record{revoked}})
			put(keyBucket, "key-1", before)(t, s, path)
		},
		"record missing":     tx(func(tx *bbolt.Tx) error { return tx.Bucket(keyBucket).Delete([]byte("key-1")) }),
		"clock changed":      put(metaBucket, latestKey, []byte(`"2026-01-02T03:04:05Z"`)),
		"unknown value":      put(metaBucket, "lauest", []byte("x")),
		"unknown bucket":     tx(func(tx *bbolt.Tx) error { _, err := tx.CreateBucket([]byte("other")); return err }),
		"bucket missing":     tx(func(tx *bbolt.Tx) error { return tx.DeleteBucket(sandboxBucket) }),
		"outbox missing":     tx(func(tx *bbolt.Tx) error { return tx.DeleteBucket(outboxBucket) }),
		"audit line missing": tx(func(tx *bbolt.Tx) error { return tx.Bucket(outboxBucket).Delete(outboxKey(200)) }),
		"audit line changed": tx(func(tx *bbolt.Tx) error {
			line := get(tx, outboxBucket, string(outboxKey(7)))
			return tx.Bucket(outboxBucket).Put(outboxKey(7), bytes.Replace(line, []byte("1000"), []byte("1001"), 1))
		}),
		"no schema version":       tx(func(tx *bbolt.Tx) error { return tx.DeleteBucket(metaBucket) }),
		"damaged schema version":  put(metaBucket, string(schemaKey), []byte("two")),
		"earlier schema version":  put(metaBucket, string(schemaKey), []byte("1")),
		"empty file":              file(func([]byte) []byte { return nil }),
		"garbage":                 file(func(d []byte) []byte { return []byte(strings.Repeat("garbage!", len(d)/8)) }),
		"truncated":               file(func(d []byte) []byte { return d[:3*os.Getpagesize()] }),
		"truncated within a page": file(func(d []byte) []byte { return d[:2*os.Getpagesize()+100] }),
		"zeroed pages":            file(func(d []byte) []byte { clear(d[2*os.Getpagesize():]); return d }),
		"both states zeroed":      file(func(d []byte) []byte { clear(d[:2*os.Getpagesize()]); return d }),
		"text before the content": file(func(d []byte) []byte { return append([]byte("hello\n"), d...) }),
	}
	for name, damage := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, fileName)
			s := open(t, dir)
			var c keys.Change
			usage := map[string]keys.Usage{}
			for i := range 200 {
				id := fmt.Sprintf("key-%d", i)
				c.Put = append(c.Put, keyRecord(id))
				c.Events = append(c.Events, audit.Event{Action: audit.KeyCreate, Actor: "uid:1000", Target: id})
				usage[id] = keys.Usage{Requests: 1}
			}
			commit(t, s, c)
			if err := s.SaveUsage(usage, moment); err != nil {
				t.Fatal(err)
			}
			damage(t, s, path)
			_ = s.Close()
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Open(dir); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), path) {
				t.Errorf("Open: %v, want data loss naming the file", err)
			} else {
				t.Log(err)
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

func TestSnapshot(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	want := []keys.Record{keyRecord("a"), keyRecord("b")}
	commit(t, s, keys.Change{Put: want})
	path := filepath.Join(t.TempDir(), "copy")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	snapshot, err := s.OpenSnapshot()
	if err != nil {
		t.Fatal(err)
	}
	deleted := make(chan error)
	go func() { deleted <- s.CommitKeys(keys.Change{Delete: []string{"a", "b"}}) }() // must not affect the snapshot
	if _, err := snapshot.WriteTo(f); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(snapshot.Close(), f.Close(), <-deleted); err != nil {
		t.Fatal(err)
	}
	got, err := ReadKeys(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	edit(t, path, func(d []byte) []byte { return d[:len(d)-1] })
	if _, err := ReadKeys(path); !errdefs.IsDataLoss(err) {
		t.Errorf("ReadKeys of a truncated file: %v, want data loss", err)
	}
	if _, err := ReadKeys(path + "-not-there"); !os.IsNotExist(err) {
		t.Errorf("ReadKeys of a missing file: %v, want not exist", err)
	}
}
