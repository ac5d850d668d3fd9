package portal

import (
	"errors"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	processes "github.com/msbd/msbd/daemon/internal/sys/process"
	"github.com/msbd/msbd/daemon/internal/sys/timerslack"
)

// children starts the portal's processes. It reaps them, and every orphan that the kernel reparents to the portal.
// Nothing else in the program may wait for a child, because it would race with reap for exit statuses. So the program
// cannot use os/exec, which waits for its children.
type children struct {
	load *load

	mu        sync.Mutex
	processes map[int]*process // the processes of start that have not been reaped yet, by pid
}

// process is a child of the portal. It is the leader of a session and a process group.
type process struct {
	pid    int
	parent *children
	// exited is closed once the process has been reaped and status is set.
	exited chan struct{}
	status syscall.WaitStatus
	// group is the process's own cgroup, with everything that it started. It is nil if there is no such cgroup.
	group *group
	// killed says that the portal sent SIGKILL to the process or its group.
	killed bool
	// oomKills is how many processes of the load had been killed before this one started.
	oomKills atomic.Uint64
}

// adoptOrphans makes this process the reaper of its orphaned descendants. If it is PID 1, it already is. From then on,
// the returned children reaps every child. It starts processes in load.
func adoptOrphans(load *load) (*children, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, os.NewSyscallError("prctl", err)
	}
	c := &children{load: load, processes: make(map[int]*process)}
	sigchld := make(chan os.Signal, 1)
	signal.Notify(sigchld, syscall.SIGCHLD)
	go func() {
		for range sigchld {
			c.reap()
		}
	}()
	return c, nil
}

// reap collects every child that has exited. One SIGCHLD may be sent for several of them.
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
		if p := c.processes[pid]; p != nil {
			delete(c.processes, pid)
			p.status = status
			close(p.exited)
		}
	}
}

// launch describes a process to start.
type launch struct {
	path      string // of the program
	argv, env []string
	dir       string // the working directory; empty for that of the portal
	// otherDirs are directories for a user who may not enter dir. start uses the first one that it can.
	otherDirs []string
	user      *account
	// credential is that of user; nil if the process has the credentials of the portal.
	credential *syscall.Credential
	files      []*os.File // its descriptors 0, 1, 2 and so on
	terminal   bool       // descriptor 0 is the terminal that controls it
}

// setUser sets the user of the process. It returns a gRPC status if the portal may not start processes of that user.
func (l *launch) setUser(user *account) (err error) {
	l.user = user
	l.credential, err = user.credential()
	return err
}

// setDirectory sets the working directory of the process, for the parameters of directory. If neither is given, a user who may not
// enter the directory of the image starts in the home directory or in /. The caller has set the user. Errors are gRPC statuses.
func (l *launch) setDirectory(workdir, cwd string) (err error) {
	if l.dir, err = directory(workdir, cwd, l.user.home); err != nil || cwd != "" || workdir != "" {
		return err
	}
	l.dir, _ = os.Getwd()
	l.otherDirs = []string{l.user.home, "/"}
	return nil
}

// startError returns the gRPC status for an error of the start of the program name.
func (l *launch) startError(name string, err error) error {
	switch {
	case l.credential == nil || !errors.Is(err, syscall.EACCES):
		return startError(name, l.path, err)
	case l.otherDirs != nil:
		return status.Errorf(codes.PermissionDenied, "%s cannot be run by the user %q, who may not use the program %q", name, l.user.name, l.path)
	}
	return status.Errorf(codes.PermissionDenied,
		"%s cannot be run by the user %q, who may not use the program or the working directory %q: choose another cwd, such as /",
		name, l.user.name, l.dir)
}

// own makes the user of the process the owner of files. Otherwise it could not open /dev/stdout and the like.
func (l *launch) own(files ...*os.File) error {
	if l.credential == nil {
		return nil
	}
	for _, f := range files {
		if err := f.Chown(int(l.credential.Uid), -1); err != nil {
			return err
		}
	}
	return nil
}

// start starts a process, and sets the directory of l to that in which it starts. If fork, chdir or exec fails, start returns
// its errno. Only the kernel knows which directories the user may enter, so start tries them.
func (c *children) start(l *launch) (*process, error) {
	p, err := c.startIn(l, l.dir)
	if !errors.Is(err, syscall.EACCES) {
		return p, err
	}
	for _, dir := range l.otherDirs {
		if p, err = c.startIn(l, dir); err == nil {
			l.dir = dir
			break
		}
	}
	return p, err
}

// startIn is start in dir.
func (c *children) startIn(l *launch, dir string) (*process, error) {
	fds := make([]uintptr, len(l.files))
	for i, f := range l.files {
		fds[i] = f.Fd()
	}
	p := &process{parent: c, exited: make(chan struct{})}
	p.oomKills.Store(c.load.oomKills())
	attr := &syscall.ProcAttr{Dir: dir, Env: l.env, Files: fds, Sys: &syscall.SysProcAttr{
		Setsid: true, Setctty: l.terminal, Credential: l.credential,
	}}
	if c.load != nil {
		dir := c.load.dir
		if c.load.groups != nil {
			created, err := c.load.groups.create()
			if err != nil {
				return nil, err
			}
			defer created.dir.Close()
			p.group, dir = created.group, created.dir
			if share := c.load.share(); share > 0 {
				err = p.group.set("pids.max", share)
			}
			if err != nil {
				p.group.release()
				return nil, err
			}
		}
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(dir.Fd())
	}
	// Hold the lock so that the process is not reaped before it is in the map.
	c.mu.Lock()
	defer c.mu.Unlock()
	err := processes.WithoutOOMProtection(func() error {
		return timerslack.WithDefault(func() (err error) {
			p.pid, err = syscall.ForkExec(l.path, l.argv, attr)
			return err
		})
	})
	if err != nil {
		p.group.release()
		return nil, err
	}
	c.processes[p.pid] = p
	return p, nil
}

// kill kills the process group of every process that is still running.
func (c *children) kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for pid := range c.processes {
		_ = syscall.Kill(-pid, syscall.SIGKILL)
	}
}

// errEnded is returned for a process that has been reaped. The kernel may have given its pid to another process.
var errEnded = errors.New("the process has ended")

// signal sends sig to the process, but not to its group.
func (p *process) signal(sig syscall.Signal) error { return p.send(p.pid, sig) }

// signalGroup sends sig to the process's group.
func (p *process) signalGroup(sig syscall.Signal) error { return p.send(-p.pid, sig) }

// signalAll sends sig to everything that the process has started. If the process has no cgroup of its own, that is its
// process group; otherwise it also works after the process has been reaped.
func (p *process) signalAll(sig syscall.Signal) error {
	if p.group == nil {
		return p.signalGroup(sig)
	}
	if sig != syscall.SIGKILL {
		return p.group.signal(sig)
	}
	p.parent.mu.Lock()
	if p.parent.processes[p.pid] == p {
		p.killed = true
	}
	p.parent.mu.Unlock()
	return p.group.kill()
}

func (p *process) send(target int, sig syscall.Signal) error {
	p.parent.mu.Lock()
	defer p.parent.mu.Unlock()
	// After the process was reaped, the kernel may have reused its pid.
	if p.parent.processes[p.pid] != p {
		return errEnded
	}
	p.killed = p.killed || sig == syscall.SIGKILL
	return syscall.Kill(target, sig)
}

// running reports whether the process has not been reaped yet.
func (p *process) running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// outOfMemory returns why the process ended, if it has ended because the kernel killed it or a process that it waited
// for when memory ran out. Otherwise it returns "". Other processes may have been killed at the same time, so the
// process must also have ended as such a process does: by SIGKILL, or with the exit code that shells give it. The caller
// must have waited for exited.
func (p *process) outOfMemory() string {
	if p.killed || exitCode(p.status) != 128+int32(syscall.SIGKILL) || p.parent.load.oomKills() == p.oomKills.Load() {
		return ""
	}
	return p.parent.load.outOfMemory()
}
