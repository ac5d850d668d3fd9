package container

import (
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Reaper reaps all children of PID 1. These are the processes that it has started, and the orphans that the kernel
// reparents to PID 1.
type Reaper struct {
	// mu is held during each fork, so that a child is not reaped before it is in children. It is also held during each
	// kill, so that a signal does not reach another process that has got the pid.
	mu       sync.Mutex
	children map[int]func(unix.WaitStatus) // exit callbacks by pid
}

// NewReaper returns a reaper without children.
func NewReaper() *Reaper {
	return &Reaper{children: make(map[int]func(unix.WaitStatus))}
}

// start forks a child. The reaper calls exited once when the child has exited, while it holds mu.
func (r *Reaper) start(argv0 string, argv []string, attr *syscall.ProcAttr, exited func(unix.WaitStatus)) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(argv0, argv, attr)
	if err != nil {
		return 0, err
	}
	r.children[pid] = exited
	return pid, nil
}

// signal sends sig to a child that start has returned. It does nothing if the child has exited.
func (r *Reaper) signal(pid int, sig unix.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.children[pid]; !ok {
		return nil
	}
	return unix.Kill(pid, sig)
}

// Run reaps children each time that a SIGCHLD arrives. It returns when the channel is closed.
func (r *Reaper) Run(sigchld <-chan os.Signal) {
	for range sigchld {
		r.reap()
	}
}

// reap reaps all children that have exited.
func (r *Reaper) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if exited := r.children[pid]; exited != nil {
			delete(r.children, pid)
			exited(status)
		}
	}
}
