package container

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// oomWatch reports each process of a group, or of one below, that the kernel killed because memory ran
// out.
type oomWatch struct {
	events  string
	inotify *os.File

	mu       sync.Mutex
	killed   func() // nil until somebody listens
	reported uint64
}

// watchOOM begins to watch a group's file memory.events.
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

// listen calls killed once for each kill, until Close.
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

// check reports the kills that were not reported yet.
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
