package portal

import (
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// children starts the portal's processes and reaps them, along with every orphan that the kernel
// hands to the portal as PID 1. Its reap is the only wait in the program: a second one (os/exec
// has its own) would race with it for exit statuses.
type children struct {
	mu  sync.Mutex
	own map[int]*process
}

// process is a child, the leader of a session and a process group of its own.
type process struct {
	pid    int
	parent *children
	// exited is closed when the process was reaped; status is set before.
	exited chan struct{}
	status syscall.WaitStatus
}

// adoptOrphans makes this process the reaper of its descendants, as PID 1 is already, and returns
// the children that it may have from then on.
func adoptOrphans() (*children, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, os.NewSyscallError("prctl", err)
	}
	c := &children{own: make(map[int]*process)}
	died := make(chan os.Signal, 1)
	signal.Notify(died, syscall.SIGCHLD)
	go func() {
		for range died {
			c.reap()
		}
	}()
	return c, nil
}

// reap collects every child that has exited. One SIGCHLD may stand for several of them.
func (c *children) reap() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if p := c.own[pid]; p != nil {
			delete(c.own, pid)
			p.status = status
			close(p.exited)
		}
	}
}

// start runs the program at path with the files as its descriptors 0, 1, 2 and so on. The error
// is the errno of fork, chdir or exec.
func (c *children) start(path string, argv, env []string, dir string, files ...*os.File) (*process, error) {
	fds := make([]uintptr, len(files))
	for i, f := range files {
		fds[i] = f.Fd()
	}
	// Locked so that the process cannot be reaped before it is known.
	c.mu.Lock()
	defer c.mu.Unlock()
	pid, err := syscall.ForkExec(path, argv, &syscall.ProcAttr{
		Dir:   dir,
		Env:   env,
		Files: fds,
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return nil, err
	}
	p := &process{pid: pid, parent: c, exited: make(chan struct{})}
	c.own[pid] = p
	return p, nil
}

// kill ends every process group whose leader still runs.
func (c *children) kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for pid := range c.own {
		_ = syscall.Kill(-pid, syscall.SIGKILL)
	}
}

// signal sends sig to the process alone; once it was reaped, to nobody.
func (p *process) signal(sig syscall.Signal) { p.send(p.pid, sig) }

// signalGroup sends sig to all of the process's group, unless the process was reaped.
func (p *process) signalGroup(sig syscall.Signal) { p.send(-p.pid, sig) }

func (p *process) send(target int, sig syscall.Signal) {
	p.parent.mu.Lock()
	defer p.parent.mu.Unlock()
	// A reaped process's number may belong to another by now.
	if p.parent.own[p.pid] == p {
		_ = syscall.Kill(target, sig)
	}
}

// running says that the process was not reaped yet.
func (p *process) running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}
