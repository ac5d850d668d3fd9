package agent

import (
	"context"
	"os"
	"sync"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

// oomWatch tells of each process of a group, or of one below, that the kernel killed for want of
// memory.
type oomWatch struct {
	events  string
	inotify *os.File

	mu     sync.Mutex
	killed func() // nil until somebody listens
	told   uint64
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

// check tells of what was not told yet.
func (w *oomWatch) check() {
	w.mu.Lock()
	defer w.mu.Unlock()
	values, err := readKeyed(w.events)
	if err != nil || w.killed == nil {
		return
	}
	for ; w.told < values["oom_kill"]; w.told++ {
		w.killed()
	}
}

func (w *oomWatch) Close() error { return w.inotify.Close() }

// GetOOMEvent waits until the kernel kills something for want of memory.
func (a *agent) GetOOMEvent(ctx context.Context, _ *pb.GetOOMEventRequest) (*pb.OOMEvent, error) {
	select {
	case id := <-a.oom:
		if ctx.Err() != nil {
			a.reportOOM(id) // both were ready: the next caller takes it
			return nil, ctx.Err()
		}
		return &pb.OOMEvent{ContainerId: id}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// reportOOM queues an event. When nobody listens, the oldest say enough.
func (a *agent) reportOOM(id string) {
	select {
	case a.oom <- id:
	default:
	}
}
