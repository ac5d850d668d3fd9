package container

import (
	"os"
	"testing"
	"time"
)

// TestThrash tests in which load a process is killed, although the kernel kills none.
func TestThrash(t *testing.T) {
	t.Parallel()
	page := uint64(os.Getpagesize())
	// What the programs of a sandbox did in each second while they thrashed.
	const refaults, faults, cache = 30_000, 1_000, 3 << 20
	for _, c := range []struct {
		name                    string
		refaults, faults, cache uint64 // in each sample
		every                   time.Duration
		pause                   int // the sample after which nothing happens for a while; 0 for none
		want                    int // the sample that reports it; 0 for none
	}{
		{name: "thrashing", refaults: refaults, faults: faults, cache: cache, every: time.Second, want: 11},
		{name: "thrashing slowly", refaults: cache/page + 1, faults: 50, cache: cache, every: 1500 * time.Millisecond, want: 11},
		{name: "thrashing with a pause", refaults: refaults, faults: faults, cache: cache, every: time.Second, pause: 10, want: 21},
		{name: "a large cache", refaults: refaults, faults: faults, cache: 16 << 20, every: time.Second},
		{name: "a cache that is read seldom", refaults: cache/page - 1, faults: faults, cache: cache, every: time.Second},
		{name: "files that are read again, but not executed", refaults: refaults, cache: cache, every: time.Second},
		{name: "now and then at the limit", refaults: refaults, faults: faults, cache: cache, every: 2 * time.Second},
	} {
		var w thrash
		now, got := time.Now(), 0
		stat := map[string]uint64{"workingset_refault_file": 7 * refaults, "pgmajfault": 7 * faults}
		for i := 1; i <= 30 && got == 0; i++ {
			stat["active_file"], stat["inactive_file"] = c.cache/2, c.cache-c.cache/2
			if w.lasts(now, stat) {
				got = i
			}
			now = now.Add(c.every)
			if i == c.pause {
				now = now.Add(time.Second)
			}
			stat["workingset_refault_file"] += c.refaults
			stat["pgmajfault"] += c.faults
		}
		if got != c.want {
			t.Errorf("%s: killed in sample %d, want %d", c.name, got, c.want)
		}
	}
}
