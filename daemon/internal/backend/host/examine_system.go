package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const asRoot = "sudo msb doctor"

// minKernel is the oldest kernel with all features that msbd needs. The newest of these is PIDFD_NONBLOCK.
const minKernel = "5.10.0"

var prettyNameRE = regexp.MustCompile(`(?m)^PRETTY_NAME="?([^"\n]*)"?$`)

func (e examination) system(context.Context) Check {
	const name = "system"
	detail := "Linux " + e.kernel() + ", " + strings.Replace(runtime.GOARCH, "amd64", "x86-64", 1)
	if m := prettyNameRE.FindStringSubmatch(e.read("/etc/os-release")); m != nil {
		detail = m[1] + ", " + detail
	}
	if e.inContainer() {
		detail += ", in a container"
	}
	switch {
	case runtime.GOARCH != "amd64":
		return problem(name, "use a machine with an Intel or AMD processor", "%s: msbd runs on x86-64 only", detail)
	case older(e.kernel(), minKernel):
		return problem(name, "install a newer kernel", "%s: msbd needs Linux %s or newer", detail, minKernel)
	}
	return ok(name, "%s", detail)
}

func (e examination) user(context.Context) Check {
	if os.Geteuid() == 0 {
		return ok("user", "root")
	}
	return warning("user", asRoot, "uid %d: only root can run sandboxes and do all checks", os.Geteuid())
}

// controllers are the cgroup controllers that limit and measure sandboxes.
var controllers = []string{"cpu", "memory", "cpuset", "pids"}

func (e examination) cgroups(context.Context) Check {
	const name, dir = "cgroups", "/sys/fs/cgroup"
	layout, has := "v1", func(controller string) bool { return e.exists(filepath.Join(dir, controller)) }
	if e.exists(dir + "/cgroup.controllers") {
		available := strings.Fields(e.read(dir + "/cgroup.controllers"))
		layout, has = "v2", func(controller string) bool { return slices.Contains(available, controller) }
	}
	present, missing := []string{}, []string{}
	for _, c := range controllers {
		if has(c) {
			present = append(present, c)
		} else {
			missing = append(missing, c)
		}
	}
	switch {
	case len(present) == 0:
		return problem(name, "mount -t cgroup2 cgroup2 "+dir, "no controllers in %s", dir)
	case len(missing) > 0:
		return problem(name, "enable them: remove cgroup_disable= from the kernel command line; in a container, delegate them to the container",
			"%s without %s", layout, strings.Join(missing, ", "))
	}
	return ok(name, "%s: %s", layout, strings.Join(present, ", "))
}

var availableRE = regexp.MustCompile(`(?m)^MemAvailable:\s*(\d+) kB$`)

// headroom returns the memory, in MiB, that a microVM needs in addition to its sandbox's memory.
func (r Route) headroom() int {
	if r.Hypervisor == Kata {
		return 256
	}
	return 128
}

func (e examination) memory(context.Context) Check {
	const name = "memory"
	m := availableRE.FindStringSubmatch(e.read("/proc/meminfo"))
	if m == nil {
		return warning(name, "mount /proc", "/proc/meminfo does not show the available memory")
	}
	kib, _ := strconv.Atoi(m[1])
	available, headroom := kib>>10, e.route.headroom()
	detail, fix := fmt.Sprintf("%s available", mib(available)), "free some memory"
	if e.route.guestsInShm() {
		var shm unix.Statfs_t
		if err := unix.Statfs(e.root+"/dev/shm", &shm); err != nil {
			return problem(name, "mount -t tmpfs shm /dev/shm", "%s, but /dev/shm, which holds the memory of guests, is not usable: %v", detail, err)
		}
		if free := int(shm.Bavail * uint64(shm.Bsize) >> 20); free < available {
			available = free
			detail, fix = fmt.Sprintf("%s, of which guests can use %s in /dev/shm", detail, mib(free)), "mount -o remount,size=90% /dev/shm"
		}
	}
	count := available / (e.DefaultMemoryMiB + headroom)
	sandboxes := "sandboxes"
	if count == 1 {
		sandboxes = "sandbox"
	}
	detail += fmt.Sprintf(", enough for %d %s with the default %s", count, sandboxes, mib(e.DefaultMemoryMiB))
	switch {
	case available < e.DefaultMemoryMiB+headroom:
		return problem(name, fix+", or lower default-memory-mib", "%s", detail)
	case available < e.MaxMemoryMiB+headroom:
		return warning(name, fix+", or lower max-memory-mib", "%s, but too little for a sandbox of the maximum %s", detail, mib(e.MaxMemoryMiB))
	}
	return ok(name, "%s", detail)
}

// mib formats n MiB.
func mib(n int) string {
	if n < 1024 {
		return fmt.Sprintf("%d MiB", n)
	}
	return fmt.Sprintf("%.1f GiB", float64(n)/1024)
}

const (
	// lowSpace is the free space in the state directory, in MiB, below which disk returns a warning. An image takes
	// about 100 MiB.
	lowSpace = 5 << 10
	// minSpace is the free space, in MiB, below which disk returns a problem.
	minSpace = 512
)

func (e examination) disk(context.Context) Check {
	const name = "disk"
	// A directory that does not exist yet will be created on the file system of its closest existing parent.
	dir := e.StateDir
	for {
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) || dir == "/" {
			break
		}
		dir = filepath.Dir(dir)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return warning(name, asRoot, "not checked: %s: %v", dir, err)
	}
	const moveStateDir = "set state-dir to a directory on another disk"
	free := int(fs.Bavail * uint64(fs.Bsize) >> 20)
	detail := fmt.Sprintf("%s free in %s", mib(free), e.StateDir)
	switch {
	case fs.Flags&unix.ST_RDONLY != 0:
		return problem(name, moveStateDir, "%s is on a read-only file system", e.StateDir)
	case fs.Type == unix.OVERLAYFS_SUPER_MAGIC:
		return problem(name, moveStateDir+" (ext4 or xfs) or on a volume of the container", "%s is on an overlayfs, but the files of a sandbox cannot be on an overlayfs", e.StateDir)
	case fs.Type == unix.NFS_SUPER_MAGIC:
		return problem(name, moveStateDir+" (ext4 or xfs)", "%s is on NFS, but the files of a sandbox cannot be on NFS", e.StateDir)
	case free < minSpace:
		return problem(name, "free some space, or "+moveStateDir, "%s, which is too little for images and the files of sandboxes", detail)
	case free < lowSpace:
		return warning(name, "free some space, or "+moveStateDir, "%s, which may be too little for images and the files of sandboxes", detail)
	}
	return ok(name, "%s", detail)
}

func (e examination) directories(context.Context) Check {
	return CheckDirectories(e.StateDir, filepath.Dir(e.Socket))
}

func (e examination) overlayfs(context.Context) Check {
	const name = "overlayfs"
	switch {
	case slices.Contains(strings.Fields(e.read("/proc/filesystems")), "overlay"):
		return ok(name, "usable")
	case e.hasModule("overlay"):
		return ok(name, "available as a module, which is loaded when needed")
	}
	return problem(name, "boot the distribution's standard kernel", "the kernel %s has no overlayfs", e.kernel())
}

// minClock is a time in the past. A clock that shows an earlier time is wrong.
var minClock = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func (e examination) clock(context.Context) Check {
	const name, remedy = "clock", "synchronize it: apt install chrony, or timedatectl set-ntp true"
	now := time.Now()
	if now.Before(minClock) {
		return problem(name, remedy, "the clock shows %s, which is in the past; the expiry of API keys depends on the clock", now.UTC().Format(time.RFC3339))
	}
	state, err := unix.Adjtimex(&unix.Timex{})
	switch {
	case err != nil:
		return warning(name, asRoot, "not checked: %v", err)
	case state == unix.TIME_ERROR:
		return warning(name, remedy, "the clock is not synchronized; the expiry of API keys depends on the clock")
	}
	return ok(name, "synchronized")
}

// systemLogs are the sockets that Kata's shim tries for the system log.
var systemLogs = []string{"/dev/log", "/var/run/syslog", "/var/run/log"}

func (e examination) systemLog(ctx context.Context) Check {
	for _, path := range systemLogs {
		if tryDial(ctx, "unixgram", path) == nil {
			return ok("system log", "%s", path)
		}
	}
	return ok("system log", "none; msbd provides one, because Kata's shim needs it")
}

// tryDial checks that something listens on a Unix socket. It returns nil if a connection can be made.
func tryDial(ctx context.Context, network, path string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, network, path)
	if err != nil {
		return err
	}
	return conn.Close()
}

func (e examination) files(context.Context) Check {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return warning("open files", asRoot, "not checked: %v", err)
	}
	return CheckFileLimit(limit.Cur, e.Options, e.MaxConnections)
}

func (e examination) group(context.Context) Check {
	if _, err := user.LookupGroup(e.Group); err != nil {
		return ok("group", "there is no group %s, so only root can administer the server (to allow others: groupadd --system %[1]s)", e.Group)
	}
	return ok("group", "members of %s can administer the server", e.Group)
}

// port checks whether the gateway's address is free, or in use by a running server or by another program.
func (e examination) port(ctx context.Context) Check {
	const name = "address"
	socketErr := tryDial(ctx, "unix", e.Socket)
	if socketErr == nil {
		return ok(name, "%s; a server is running (socket %s)", e.Listen, e.Socket)
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", e.Listen)
	switch {
	case errors.Is(err, unix.EADDRINUSE) && errors.Is(socketErr, os.ErrPermission):
		return warning(name, asRoot, "%s is in use, perhaps by msbd, but this user may not open the socket %s to check", e.Listen, e.Socket)
	case errors.Is(err, unix.EADDRINUSE):
		return problem(name, "choose another port with --port, or find the program with 'ss -ltnp' and end it", "%s is in use by another program", e.Listen)
	case errors.Is(err, unix.EACCES):
		return problem(name, "choose a port of 1024 or above, or run as root", "%s: only root may listen on this port", e.Listen)
	case err != nil:
		return problem(name, "set listen to another address", "%v", err)
	}
	listener.Close()
	return ok(name, "%s is free", e.Listen)
}

// withoutClass returns the text of err without the error class at its end. Only programs need the class.
func withoutClass(err error) string {
	text := strings.TrimSuffix(err.Error(), ": "+errdefs.ErrFailedPrecondition.Error())
	return strings.TrimSuffix(text, ": "+errdefs.ErrInvalidArgument.Error())
}
