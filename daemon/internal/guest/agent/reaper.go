package agent

import (
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// reaper collects every child of PID 1: those that it started, and the orphans that fell to it.
type reaper struct {
	// mu is held across each fork, so that no child is collected before it is known, and across
	// each kill, so that no signal reaches a stranger with a reused pid.
	mu       sync.Mutex
	children map[int]func(unix.WaitStatus)
}

// start forks a child. exited is called once when it ends, under the reaper's lock.
func (r *reaper) start(argv0 string, argv []string, attr *syscall.ProcAttr, exited func(unix.WaitStatus)) (int, error) {
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
func (r *reaper) signal(pid int, sig unix.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.children[pid]; !ok {
		return nil
	}
	return unix.Kill(pid, sig)
}

func (r *reaper) run(sigchld <-chan os.Signal) {
	for range sigchld {
		r.collect()
	}
}

func (r *reaper) collect() {
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
