package container

import (
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Reaper collects every child of PID 1: those that it started, and the orphans that it inherits.
type Reaper struct {
	// mu is held across each fork, so that no child is collected before it is known, and across
	// each kill, so that no signal reaches a stranger with a reused pid.
	mu       sync.Mutex
	children map[int]func(unix.WaitStatus)
}

// NewReaper returns a reaper that knows no child.
func NewReaper() *Reaper {
	return &Reaper{children: make(map[int]func(unix.WaitStatus))}
}

// start forks a child. exited is called once when it ends, under the reaper's lock.
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

// signal sends sig to a child that start returned; a child that is gone needs none.
func (r *Reaper) signal(pid int, sig unix.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.children[pid]; !ok {
		return nil
	}
	return unix.Kill(pid, sig)
}

// Run collects children each time that a signal arrives.
func (r *Reaper) Run(sigchld <-chan os.Signal) {
	for range sigchld {
		r.collect()
	}
}

func (r *Reaper) collect() {
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
