package keys_test

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

var from = netip.MustParseAddr("192.0.2.1")

// The time to revoke one of 10,000 keys that has 1,000 requests in progress: until Revoke returns (ack), and until the
// last request is canceled (cut), compared with one fsync.
func BenchmarkRevoke(b *testing.B) {
	const others, requests = 10_000, 1_000
	dir := filepath.Join(b.TempDir(), "state")
	s, i, v, err := openKeys(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	ctx := context.Background()
	newKey := func() (keys.Record, keys.Principal) {
		secret, r, err := i.Issue(ctx, keys.IssueRequest{})
		if err != nil {
			b.Error(err)
			return r, keys.Principal{}
		}
		p, err := v.Verify(secret.Reveal(), from)
		if err != nil {
			b.Error(err)
		}
		return r, p
	}
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for range others / 64 {
				newKey()
			}
		})
	}
	wg.Wait()
	file, err := os.Create(filepath.Join(dir, "fsync"))
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()

	var acknowledged, cut, synced []time.Duration
	for b.Loop() {
		r, p := newKey()
		var ended sync.WaitGroup
		ended.Add(requests)
		for range requests {
			bound, cancel := p.Bind(ctx)
			defer cancel()
			context.AfterFunc(bound, ended.Done)
		}
		start := time.Now()
		if _, err := i.Revoke(ctx, r.ID, 0); err != nil {
			b.Fatal(err)
		}
		acknowledged = append(acknowledged, time.Since(start))
		ended.Wait()
		cut = append(cut, time.Since(start))

		start = time.Now()
		if _, err := file.WriteAt(page, 0); err != nil {
			b.Fatal(err)
		}
		if err := file.Sync(); err != nil {
			b.Fatal(err)
		}
		synced = append(synced, time.Since(start))
	}
	report := func(times []time.Duration, name string) (p50 float64) {
		slices.Sort(times)
		at := func(q float64) float64 { return times[int(q*float64(len(times)-1))].Seconds() * 1000 }
		b.ReportMetric(at(0.5), name+"-p50-ms")
		b.ReportMetric(at(0.99), name+"-p99-ms")
		return at(0.5)
	}
	b.ReportMetric(0, "ns/op")
	ack, fsync := report(acknowledged, "ack"), report(synced, "fsync")
	report(cut, "cut")
	b.ReportMetric(ack/fsync, "ratio-to-fsync")
}

var page = []byte{4095: 1}
