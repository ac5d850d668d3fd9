package store

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/benchtest"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// compare runs ours and peer alternately. It reports the median and the 99th percentile of the times of each, and the
// ratio of the medians.
func compare(b *testing.B, ours func() error, peer func() error) {
	var times [2][]time.Duration
	for b.Loop() {
		for i, do := range []func() error{ours, peer} {
			began := time.Now()
			if err := do(); err != nil {
				b.Fatal(err)
			}
			times[i] = append(times[i], time.Since(began))
		}
	}
	for i := range times {
		slices.Sort(times[i])
	}
	at := func(i, percent int) float64 {
		return float64(times[i][len(times[i])*percent/100].Nanoseconds()) / 1e3
	}
	b.ReportMetric(0, "ns/op") // suppresses the default metric, which would be the time of both together
	b.ReportMetric(at(0, 50), "p50-µs")
	b.ReportMetric(at(0, 99), "p99-µs")
	b.ReportMetric(at(1, 50), "peer-p50-µs")
	b.ReportMetric(at(1, 99), "peer-p99-µs")
	b.ReportMetric(at(0, 50)/at(1, 50), "ratio")
}

// bareCommit returns a function that commits a record with value to a separate bbolt file.
func bareCommit(b *testing.B, value []byte) func() error {
	db, err := bbolt.Open(filepath.Join(b.TempDir(), "db"), 0o600, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { db.Close() })
	serial := 0
	return func() error {
		serial++
		return db.Update(func(tx *bbolt.Tx) error {
			bucket, err := tx.CreateBucketIfNotExists(keyBucket)
			if err != nil {
				return err
			}
			return bucket.Put([]byte(strconv.Itoa(serial)), value)
		})
	}
}

// BenchmarkCreateKey stores a key and its line in the audit log durably. With one client, it compares this with a commit
// of the same record to bbolt alone; with 64 clients, commits are shared.
func BenchmarkCreateKey(b *testing.B) {
	var serial atomic.Int64
	create := func(s *Store) error {
		id := fmt.Sprintf("%032x", uint64(serial.Add(1))*0x9E3779B97F4A7C15) // unordered, like real ids
		r := keyRecord(id)
		return s.CommitKeys(keys.Change{Put: []keys.Record{r}, Events: []audit.Event{{
			Action: audit.KeyCreate, Actor: audit.ActorUID(r.CreatedBy), Target: r.ID,
			Detail: map[string]string{"expires": "2026-01-02T04:04:05Z", "name": r.Name, "namespaces": "team-alpha,team-beta", "scopes": "sandbox:read"},
		}}})
	}
	b.Run("1 client compared with bbolt", func(b *testing.B) {
		s := open(b, b.TempDir())
		r, err := encode(keyBucket, "x", keyRecord("x"))
		if err != nil {
			b.Fatal(err)
		}
		compare(b, func() error { return create(s) }, bareCommit(b, r.sealed))
	})
	b.Run("64 clients", func(b *testing.B) {
		s := open(b, b.TempDir())
		b.SetParallelism(max(1, 64/runtime.GOMAXPROCS(0)))
		b.ResetTimer()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if err := create(s); err != nil {
					b.Error(err)
					return
				}
			}
		})
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "keys/s")
	})
}

// openFilled opens a store and creates n keys in it.
func openFilled(b *testing.B, dir string, n int) *Store {
	b.Helper()
	s := open(b, dir)
	for from := 0; from < n; from += 1000 {
		var c keys.Change
		for i := from; i < min(n, from+1000); i++ {
			id := fmt.Sprintf("%032x", uint64(i+1)*0x9E3779B97F4A7C15)
			c.Put = append(c.Put, keyRecord(id))
			c.Events = append(c.Events, audit.Event{Action: audit.KeyCreate, Actor: "uid:1000", Target: id})
		}
		commit(b, s, c)
	}
	return s
}

// BenchmarkRevoke revokes one of 10,000 keys, compared with a synced write of one page.
func BenchmarkRevoke(b *testing.B) {
	s := openFilled(b, b.TempDir(), 10_000)
	records := loaded(b, s).Records
	f, err := os.Create(filepath.Join(b.TempDir(), "file"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	page := make([]byte, 4<<10)
	i := 0
	compare(b, func() error {
		r := records[i%len(records)]
		i++
		r.RevokedAt, r.Revocation = time.Now().UTC(), keys.ByHand
		return s.CommitKeys(keys.Change{Put: []keys.Record{r}, Events: []audit.Event{{Action: audit.KeyRevoke, Actor: "uid:1000", Target: r.ID}}})
	}, func() error {
		if _, err := f.WriteAt(page, 0); err != nil {
			return err
		}
		return f.Sync()
	})
}

// BenchmarkOpen opens stores of growing numbers of keys, with all checks, and loads the keys. The audit log has a line for
// each key.
func BenchmarkOpen(b *testing.B) {
	for _, n := range []int{100, 1_000, 10_000, 100_000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			dir := b.TempDir()
			s := openFilled(b, dir, n)
			var times []time.Duration
			for b.Loop() {
				if err := s.Close(); err != nil {
					b.Fatal(err)
				}
				began := time.Now()
				var err error
				if s, err = Open(dir); err != nil {
					b.Fatal(err)
				}
				if _, err := s.LoadKeys(); err != nil {
					b.Fatal(err)
				}
				times = append(times, time.Since(began))
			}
			s.Close()
			r := benchtest.Times("open", "ms", times)
			r.At = n
			benchtest.Put(b, "store", r)
		})
	}
}
