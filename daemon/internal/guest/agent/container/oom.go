package container

import (
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// oomWatch watches a cgroup and the cgroups below it for processes that the kernel kills because they ran out of
// memory. If the kernel should kill one but does not, because the programs thrash, it makes the kernel do that.
type oomWatch struct {
	cgroup  string   // path of the cgroup
	inotify *os.File // reports changes of the cgroup's file memory.events, also each time that it is at its limit
	thrash  thrash

	mu       sync.Mutex
	killed   func() // nil until listen is called
	reported uint64 // kills that have been reported
}

// watchOOM starts watching cgroup, the path of a cgroup.
func watchOOM(cgroup string) (*oomWatch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	w := &oomWatch{cgroup: cgroup, inotify: os.NewFile(uintptr(fd), "inotify")}
	if _, err := unix.InotifyAddWatch(fd, cgroup+"/memory.events", unix.IN_MODIFY); err != nil {
		w.inotify.Close()
		return nil, err
	}
	return w, nil
}

// listen calls killed once for each kill. It returns after Close.
func (w *oomWatch) listen(killed func()) {
	w.mu.Lock()
	w.killed = killed
	w.mu.Unlock()
	buf := make([]byte, 4096)
	for {
		w.check()
		if _, err := w.inotify.Read(buf); err != nil {
			return
		}
		now := time.Now()
		if now.Sub(w.thrash.at) < thrashInterval {
			continue
		}
		if stat, err := readKeyed(w.cgroup + "/memory.stat"); err == nil && w.thrash.lasts(now, stat) {
			_ = killLargest() // if that fails, the programs continue to thrash
		}
	}
}

// check calls killed for the kills that have not been reported yet.
func (w *oomWatch) check() {
	w.mu.Lock()
	defer w.mu.Unlock()
	values, err := readKeyed(w.cgroup + "/memory.events")
	if err != nil || w.killed == nil {
		return
	}
	for ; w.reported < values["oom_kill"]; w.reported++ {
		w.killed()
	}
}

func (w *oomWatch) Close() error { return w.inotify.Close() }

// thrash recognizes that the programs of a cgroup thrash: they have used so much memory that too little is left for the
// pages of the files that they execute, so they read the same pages again and again and hardly make progress. The kernel
// kills no process then, because it can always free some of those pages. This may last forever.
type thrash struct {
	at               time.Time // of the last sample
	refaults, faults uint64    // pages that were read again, and page faults with a read, until then
	samples          int       // samples in a row in which the programs have thrashed
}

const (
	thrashInterval = time.Second // between two samples, at least
	thrashSamples  = 10          // in a row until a process is killed; a program may thrash for seconds and then make progress
	thrashCache    = 16 << 20    // bytes; with a cache of this size or more, programs do not thrash
	thrashFaults   = 50          // page faults with a read between two samples, at least
)

// lasts takes a sample of the cgroup, at least thrashInterval after the last one: stat is the content of memory.stat. It
// reports whether a process has to be killed, because the programs have thrashed in several samples in a row. They do so if
// they read as much again as the cache has room for, and do it in page faults.
func (t *thrash) lasts(now time.Time, stat map[string]uint64) bool {
	refaults, faults := stat["workingset_refault_file"], stat["pgmajfault"]
	cache := stat["active_file"] + stat["inactive_file"]
	thrashes := now.Sub(t.at) < 2*thrashInterval && cache < thrashCache &&
		(refaults-t.refaults)*uint64(os.Getpagesize()) >= cache && faults-t.faults >= thrashFaults
	t.at, t.refaults, t.faults = now, refaults, faults
	if !thrashes {
		t.samples = 0
		return false
	}
	t.samples = (t.samples + 1) % thrashSamples
	return t.samples == 0
}

// killLargest makes the kernel kill the process of the guest that uses the most memory, as if the memory had run out. The
// kernel also counts it as such a kill.
func killLargest() error {
	if os.Getpid() != 1 {
		return errors.New("this process is not the init process of a guest")
	}
	return os.WriteFile("/proc/sysrq-trigger", []byte("f"), 0)
}
