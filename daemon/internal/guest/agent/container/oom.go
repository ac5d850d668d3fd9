package container

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// oomWatch watches a cgroup and the cgroups below it for processes that the kernel kills because they ran out of
// memory.
type oomWatch struct {
	events  string // path of the cgroup's file memory.events
	inotify *os.File

	mu       sync.Mutex
	killed   func() // nil until listen is called
	reported uint64 // kills that have been reported
}

// watchOOM starts watching events, the path of a cgroup's file memory.events.
func watchOOM(events string) (*oomWatch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	w := &oomWatch{events: events, inotify: os.NewFile(uintptr(fd), "inotify")}
	if _, err := unix.InotifyAddWatch(fd, events, unix.IN_MODIFY); err != nil {
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
	}
}

// check calls killed for the kills that have not been reported yet.
func (w *oomWatch) check() {
	w.mu.Lock()
	defer w.mu.Unlock()
	values, err := readKeyed(w.events)
	if err != nil || w.killed == nil {
		return
	}
	for ; w.reported < values["oom_kill"]; w.reported++ {
		w.killed()
	}
}

func (w *oomWatch) Close() error { return w.inotify.Close() }
