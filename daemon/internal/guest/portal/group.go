package portal

import (
	"errors"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// groups creates the cgroups of processes, one for each, with the names 1, 2 and so on.
type groups struct {
	dir *os.File // the directory of the cgroup that contains them

	mu   sync.Mutex
	last uint64
	// spare is a cgroup for the next process, so that its start takes less time. It is nil if there is none.
	spare *openGroup
	// released are the cgroups whose process has ended. Processes in the background may still be in them.
	released []*group
	tidying  bool // tidy will run soon
}

// openGroup is a cgroup with its open directory.
type openGroup struct {
	*group
	dir *os.File
}

// maxRemovals is how many cgroups a call of removeEmpty tries to remove. It is more than one, so that the released ones
// become fewer.
const maxRemovals = 8

// group is the cgroup of a process. A nil group stands for none.
type group struct {
	parent *groups
	name   string
}

// create returns a new cgroup. The caller must close its directory.
func (g *groups) create() (*openGroup, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if spare := g.spare; spare != nil {
		g.spare = nil
		return spare, nil
	}
	return g.make()
}

// make creates a cgroup. The caller holds mu.
func (g *groups) make() (*openGroup, error) {
	g.removeEmpty()
	g.last++
	created := &group{g, strconv.FormatUint(g.last, 10)}
	if err := unix.Mkdirat(int(g.dir.Fd()), created.name, 0o755); err != nil {
		return nil, os.NewSyscallError("mkdirat", err)
	}
	dir, err := openAt(g.dir, created.name, unix.O_DIRECTORY)
	if err != nil {
		g.released = append(g.released, created)
		return nil, err
	}
	return &openGroup{created, dir}, nil
}

// release removes the cgroup soon or, if processes are then in it, after another one has been released.
func (g *group) release() {
	if g == nil {
		return
	}
	g.parent.mu.Lock()
	defer g.parent.mu.Unlock()
	g.parent.released = append(g.parent.released, g)
	if !g.parent.tidying {
		g.parent.tidying = true
		time.AfterFunc(tidyDelay, g.parent.tidy)
	}
}

// tidyDelay is how long tidy waits after the end of a process. The end of the process is reported meanwhile.
const tidyDelay = 5 * time.Millisecond

// tidy removes cgroups and creates the spare one.
func (g *groups) tidy() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tidying = false
	for range len(g.released)/maxRemovals + 1 {
		g.removeEmpty()
	}
	if g.spare == nil {
		g.spare, _ = g.make() // if it fails, create reports it
	}
}

// close closes the descriptors. It may be called while tidy runs.
func (g *groups) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.spare != nil {
		g.spare.dir.Close()
	}
	g.dir.Close()
}

// removeEmpty removes the released cgroups that have no processes. It tries only some of them, beginning with those that it
// has not tried for the longest time. The caller holds mu.
func (g *groups) removeEmpty() {
	for range min(maxRemovals, len(g.released)) {
		tried := g.released[0]
		g.released = g.released[1:]
		if err := unix.Unlinkat(int(g.dir.Fd()), tried.name, unix.AT_REMOVEDIR); errors.Is(err, unix.EBUSY) {
			g.released = append(g.released, tried)
		}
	}
}

// kill kills everything in the cgroup.
func (g *group) kill() error {
	f, err := openAt(g.parent.dir, g.name+"/cgroup.kill", unix.O_WRONLY)
	if err != nil {
		return ignoreRemoved(err)
	}
	defer f.Close()
	_, err = f.WriteString("1")
	return ignoreRemoved(err)
}

// signal sends sig to every process that is in the cgroup now.
func (g *group) signal(sig syscall.Signal) error {
	pids, err := g.processes()
	if err != nil {
		return ignoreRemoved(err)
	}
	for some := range slices.Chunk(pids, maxPidfds) {
		err = errors.Join(err, g.signalSome(some, sig))
	}
	return err
}

// maxPidfds is how many pidfds a call of signalSome opens.
const maxPidfds = 64

// signalSome sends sig to those of the processes that are in the cgroup.
func (g *group) signalSome(pids []int, sig syscall.Signal) (err error) {
	files := make(map[int]int, len(pids)) // pidfds by pid
	for _, pid := range pids {
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			defer unix.Close(fd)
			files[pid] = fd
		}
	}
	// A process may have exited, and another one may have got its pid, before pidfd_open. If the pid is still that of a
	// process in the cgroup, the pidfd refers to that process or to one that has exited.
	pids, err = g.processes()
	if err != nil {
		return ignoreRemoved(err)
	}
	for _, pid := range pids {
		if fd, ok := files[pid]; ok {
			if e := unix.PidfdSendSignal(fd, sig, nil, 0); e != nil && !errors.Is(e, unix.ESRCH) {
				err = errors.Join(err, e)
			}
		}
	}
	return err
}

// populated reports whether a process is in the cgroup.
func (g *group) populated() bool {
	if g == nil {
		return false
	}
	pids, err := g.processes()
	return err == nil && len(pids) > 0
}

// processes returns the pids of the processes in the cgroup.
func (g *group) processes() ([]int, error) {
	f, err := openAt(g.parent.dir, g.name+"/cgroup.procs", 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, field := range strings.Fields(string(data)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// ignoreRemoved returns nil for the error of an operation on a cgroup that has been removed, and otherwise err.
func ignoreRemoved(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}
