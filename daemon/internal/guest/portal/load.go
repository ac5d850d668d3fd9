package portal

import (
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	processes "github.com/msbd/msbd/daemon/internal/sys/process"
)

// The descriptors at which msbd's guest agent gives the portal its cgroups. An agent before the contract 1 gives it only
// the first one.
const (
	containerFD = 3 // the container's cgroup, which is read-only
	processesFD = 4 // the cgroup "processes" below the load, in which the portal creates cgroups
)

// load is the cgroup in which the portal starts its processes. The portal itself runs in another one, so that it
// responds even if its processes use all the memory, processors and process ids that they may use. A nil load means
// that the guest's agent did not provide the cgroups, as an agent other than msbd's. Then the processes run in the
// portal's cgroup.
type load struct {
	container *os.File // the directory of the container's cgroup, whose limit on memory is that of the sandbox
	dir       *os.File // the directory of the load's cgroup, which is below it
	events    *os.File // memory.events of the load; nil if the kernel does not limit its memory
	groups    *groups  // nil if the agent does not provide a cgroup for them
	// limit and count are pids.max and pids.current of the load. They are nil if the kernel does not limit its processes.
	limit, count *os.File
}

// openLoad returns the load that the guest's agent has provided, or nil if there is none.
func openLoad() (*load, error) {
	if !isCgroup(containerFD) {
		return nil, nil
	}
	l := &load{container: os.NewFile(containerFD, "cgroup")}
	if isCgroup(processesFD) {
		l.groups = &groups{dir: os.NewFile(processesFD, "processes")}
	}
	var err error
	if l.dir, err = openAt(l.container, "load", unix.O_DIRECTORY); err != nil {
		l.container.Close()
		return nil, err
	}
	l.events, _ = openAt(l.dir, "memory.events", 0)
	l.limit, _ = openAt(l.dir, "pids.max", 0)
	l.count, _ = openAt(l.dir, "pids.current", 0)
	return l, l.hide()
}

// hide keeps the programs in the sandbox, which may be root, from opening the portal's descriptors in /proc, through which
// they could change their limits. They have no CAP_SYS_PTRACE. The file with the OOM score must be opened before, because it
// then belongs to root.
func (l *load) hide() error {
	if l.groups == nil {
		return nil
	}
	_ = processes.WithoutOOMProtection(func() error { return nil })
	return os.NewSyscallError("prctl", unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0))
}

// share returns how many processes and threads a program that starts now may have: half of those that are left. So
// whatever the earlier programs do, there are some left for the next one. It returns 0 if there is no limit.
func (l *load) share() uint64 {
	limit, err := readNumber(l.limit)
	if err != nil {
		return 0
	}
	count, err := readNumber(l.count)
	if err != nil {
		return 0
	}
	if count >= limit {
		return 1 // which the start may get if others end
	}
	return (limit - count + 1) / 2
}

// readNumber returns the number that is the content of a file of a cgroup.
func readNumber(f *os.File) (uint64, error) {
	buf := make([]byte, 24)
	n, err := f.ReadAt(buf, 0)
	if err != nil && err != io.EOF {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(buf[:n])), 10, 64)
}

// isCgroup reports whether fd is the directory of a cgroup. A descriptor that the agent has not provided may be that of a
// file in a cgroup, because Go's runtime keeps the limit on the processors open.
func isCgroup(fd int) bool {
	var fs unix.Statfs_t
	var file unix.Stat_t
	return unix.Fstatfs(fd, &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC &&
		unix.Fstat(fd, &file) == nil && file.Mode&unix.S_IFMT == unix.S_IFDIR
}

func openAt(dir *os.File, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, &os.PathError{Op: "openat", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (l *load) close() {
	if l != nil {
		if l.groups != nil {
			l.groups.close()
		}
		l.events.Close()
		l.limit.Close()
		l.count.Close()
		l.dir.Close()
		l.container.Close()
	}
}

// oomKills returns how many processes of the load the kernel has killed because memory ran out. It returns 0 if it
// cannot find out.
func (l *load) oomKills() uint64 {
	if l == nil {
		return 0
	}
	buf := make([]byte, 4<<10)
	n, err := l.events.ReadAt(buf, 0)
	if err != nil && err != io.EOF {
		return 0
	}
	for line := range strings.Lines(string(buf[:n])) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok {
			n, _ := strconv.ParseUint(value, 10, 64)
			return n
		}
	}
	return 0
}

// outOfMemory describes why the kernel killed a process of the load.
func (l *load) outOfMemory() string {
	text, err := readAt(l.container, "memory.max")
	if err == nil {
		if bytes, err := strconv.ParseUint(strings.TrimSpace(text), 10, 64); err == nil {
			return "out of memory (the sandbox has " + strconv.FormatUint(bytes>>20, 10) + " MiB)"
		}
	}
	return "out of memory"
}

// readAt returns the content of a file in dir.
func readAt(dir *os.File, name string) (string, error) {
	f, err := openAt(dir, name, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := io.ReadAll(f)
	return string(data), err
}
