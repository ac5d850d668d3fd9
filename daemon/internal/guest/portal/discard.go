package portal

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// discarder reads pipes until their last writers have closed them, and drops what it reads. A process in the background
// may keep the pipes of a command open for a long time. For each of them, the discarder needs only one descriptor.
type discarder struct {
	epoll int
	// ready is epoll as a file, which Go's poller watches.
	ready *os.File
}

func newDiscarder() (*discarder, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	d := &discarder{epoll: fd, ready: os.NewFile(uintptr(fd), "epoll")}
	go d.run()
	return d, nil
}

// add takes over fd, the non-blocking read end of a pipe.
func (d *discarder) add(fd int) {
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
	if err := unix.EpollCtl(d.epoll, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		unix.Close(fd) // the kernel is out of memory
	}
}

func (d *discarder) close() { d.ready.Close() }

func (d *discarder) run() {
	raw, err := d.ready.SyscallConn()
	if err != nil {
		return
	}
	var events [64]unix.EpollEvent
	var buf [64 << 10]byte
	_ = raw.Read(func(uintptr) (ended bool) {
		for {
			n, err := unix.EpollWait(d.epoll, events[:], 0)
			if err == unix.EINTR {
				continue
			}
			if n <= 0 {
				return false
			}
			for _, event := range events[:n] {
				fd := int(event.Fd)
				if n, err := unix.Read(fd, buf[:]); n == 0 || err != nil && err != unix.EAGAIN && err != unix.EINTR {
					// A child that is just being forked may hold the pipe for a moment, so close does not remove it.
					_ = unix.EpollCtl(d.epoll, unix.EPOLL_CTL_DEL, fd, nil)
					unix.Close(fd)
				}
			}
			time.Sleep(batchDelay)
		}
	})
}
