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

// groups creates the cgroups of processes, one for each, with the names 1, 2 and so on. The process runs in the cgroup
// inner below it. The limits are those of the upper one, because a program can mount its own cgroup, as the root of a new
// cgroup namespace, and change what is in it.
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

// openGroup is a cgroup with the open directory of its inner one.
type openGroup struct {
	*group
	dir *os.File
}

const (
	inner = "all"
	// maxInner is how many cgroups there can be below that of a process. One is inner, and the others a program creates.
	maxInner = 8
)

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
	err := unix.Mkdirat(int(g.dir.Fd()), created.name+"/"+inner, 0o755)
	if err == nil {
		err = created.set("cgroup.max.descendants", maxInner)
	}
	var dir *os.File
	if err == nil {
		dir, err = openAt(g.dir, created.name+"/"+inner, unix.O_DIRECTORY)
	}
	if err != nil {
		g.released = append(g.released, created)
		return nil, err
	}
	return &openGroup{created, dir}, nil
}

// set sets a limit of the cgroup. It does nothing if the agent has not enabled the controller.
func (g *group) set(file string, value uint64) error {
	f, err := openAt(g.parent.dir, g.name+"/"+file, unix.O_WRONLY)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(strconv.FormatUint(value, 10))
	return err
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
		if err := tried.remove(); errors.Is(err, unix.EBUSY) {
			g.released = append(g.released, tried)
		}
	}
}

// remove removes the cgroup. It returns EBUSY if there are processes in it.
func (g *group) remove() error {
	err := unix.Unlinkat(int(g.parent.dir.Fd()), g.name+"/"+inner, unix.AT_REMOVEDIR)
	if errors.Is(err, unix.EBUSY) && !g.populated() { // a program has created cgroups there
		err = removeNested(g.parent.dir, g.name+"/"+inner)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return unix.Unlinkat(int(g.parent.dir.Fd()), g.name, unix.AT_REMOVEDIR)
}

// removeNested removes the cgroup at path in dir and all cgroups below it.
func removeNested(dir *os.File, path string) error {
	cgroup, err := openAt(dir, path, unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	entries, err := cgroup.ReadDir(-1)
	cgroup.Close()
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeNested(dir, path+"/"+e.Name()))
		}
	}
	return errors.Join(err, unix.Unlinkat(int(dir.Fd()), path, unix.AT_REMOVEDIR))
}

// kill kills everything in the cgroup and those below it.
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

// populated reports whether a process is in the cgroup or those below it.
func (g *group) populated() bool {
	if g == nil {
		return false
	}
	events, err := readAt(g.parent.dir, g.name+"/cgroup.events")
	return err == nil && strings.Contains(events, "populated 1")
}

// processes returns the pids of the processes in the cgroup.
func (g *group) processes() ([]int, error) {
	f, err := openAt(g.parent.dir, g.name+"/"+inner+"/cgroup.procs", 0)
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
