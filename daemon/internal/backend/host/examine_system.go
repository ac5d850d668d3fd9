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

// goodKernel has all that msbd asks of a host's kernel: PIDFD_NONBLOCK came last.
const goodKernel = "5.10.0"

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
	case older(e.kernel(), goodKernel):
		return problem(name, "install a newer kernel", "%s: older than %s", detail, goodKernel)
	}
	return ok(name, "%s", detail)
}

func (e examination) user(context.Context) Check {
	if os.Geteuid() == 0 {
		return ok("user", "root")
	}
	return warning("user", asRoot, "uid %d: only root can run sandboxes, and look at everything", os.Geteuid())
}

// The cgroup controllers that sandboxes are bounded and measured by.
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
		return problem(name, "let the kernel have them: no cgroup_disable= in /proc/cmdline; in a container, delegate them to it",
			"%s without %s", layout, strings.Join(missing, ", "))
	}
	return ok(name, "%s: %s", layout, strings.Join(present, ", "))
}

var availableRE = regexp.MustCompile(`(?m)^MemAvailable:\s*(\d+) kB$`)

// headroom is what a microVM takes beyond its sandbox's memory, in MiB.
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
		return warning(name, "mount /proc", "/proc/meminfo does not say how much there is")
	}
	kib, _ := strconv.Atoi(m[1])
	available, headroom := kib>>10, e.route.headroom()
	detail, more := fmt.Sprintf("%s available", mib(available)), "free some"
	if e.route.Hypervisor == Kata && !e.route.ownConfig {
		// Kata's driver keeps the guests' memory there.
		var shm unix.Statfs_t
		if err := unix.Statfs(e.root+"/dev/shm", &shm); err != nil {
			return problem(name, "mount -t tmpfs shm /dev/shm", "%s, and no /dev/shm for guests: %v", detail, err)
		}
		if free := int(shm.Bavail * uint64(shm.Bsize) >> 20); free < available {
			available = free
			detail, more = fmt.Sprintf("%s, %s of it for guests in /dev/shm", detail, mib(free)), "mount -o remount,size=90% /dev/shm"
		}
	}
	detail += fmt.Sprintf(": room for %d sandboxes of the default %s", available/(e.DefaultMemoryMiB+headroom), mib(e.DefaultMemoryMiB))
	switch {
	case available < e.DefaultMemoryMiB+headroom:
		return problem(name, more+", or lower default-memory-mib", "%s", detail)
	case available < e.MaxMemoryMiB+headroom:
		return warning(name, more+", or lower max-memory-mib", "%s, but for none of the %s that one may ask for", detail, mib(e.MaxMemoryMiB))
	}
	return ok(name, "%s", detail)
}

func mib(n int) string {
	if n < 1024 {
		return fmt.Sprintf("%d MiB", n)
	}
	return fmt.Sprintf("%.1f GiB", float64(n)/1024)
}

// How much free space in the state directory is little, and too little, in MiB. An image takes some 100.
const (
	littleSpace = 5 << 10
	noSpace     = 512
)

func (e examination) disk(context.Context) Check {
	const name = "disk"
	// What is not there yet will be made on the file system of its parent.
	dir := e.StateDir
	for {
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) || dir == "/" {
			break
		}
		dir = filepath.Dir(dir)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return warning(name, asRoot, "not looked at: %s: %v", dir, err)
	}
	const elsewhere = "put it on a disk with state-dir"
	free := int(fs.Bavail * uint64(fs.Bsize) >> 20)
	detail := fmt.Sprintf("%s free in %s", mib(free), e.StateDir)
	switch {
	case fs.Flags&unix.ST_RDONLY != 0:
		return problem(name, elsewhere, "%s is on a read-only file system", e.StateDir)
	case fs.Type == unix.OVERLAYFS_SUPER_MAGIC:
		return problem(name, elsewhere+" (ext4 or xfs), or on a volume of the container", "%s is on an overlayfs, on which sandboxes cannot have theirs", e.StateDir)
	case fs.Type == unix.NFS_SUPER_MAGIC:
		return problem(name, elsewhere+" (ext4 or xfs)", "%s is on NFS, on which sandboxes cannot have their overlayfs", e.StateDir)
	case free < noSpace:
		return problem(name, "free some, or "+elsewhere, "%s", detail)
	case free < littleSpace:
		return warning(name, "free some, or "+elsewhere, "%s: little for images and what sandboxes write", detail)
	}
	return ok(name, "%s", detail)
}

func (e examination) overlayfs(context.Context) Check {
	const name = "overlayfs"
	switch {
	case slices.Contains(strings.Fields(e.read("/proc/filesystems")), "overlay"):
		return ok(name, "usable")
	case e.hasModule("overlay"):
		return ok(name, "a module, loaded when it is needed")
	}
	return problem(name, "boot the distribution's standard kernel", "the kernel %s has no overlayfs", e.kernel())
}

// sane is a time that is in the past of every right clock.
var sane = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func (e examination) clock(context.Context) Check {
	const name, remedy = "clock", "let something set it: apt install chrony, or timedatectl set-ntp true"
	now := time.Now()
	if now.Before(sane) {
		return problem(name, remedy, "%s is in the past; API keys live by the clock", now.UTC().Format(time.RFC3339))
	}
	state, err := unix.Adjtimex(&unix.Timex{})
	switch {
	case err != nil:
		return warning(name, asRoot, "not looked at: %v", err)
	case state == unix.TIME_ERROR:
		return warning(name, remedy, "not synchronised, and API keys live by it")
	}
	return ok(name, "synchronised")
}

// systemLogs are where Kata's shim looks for a system log.
var systemLogs = []string{"/dev/log", "/var/run/syslog", "/var/run/log"}

func (e examination) systemLog(ctx context.Context) Check {
	for _, path := range systemLogs {
		if answers(ctx, "unixgram", path) == nil {
			return ok("system log", "%s", path)
		}
	}
	return ok("system log", "none; msbd stands in for it, as Kata's shim needs one")
}

// answers is nil if something listens on a Unix socket.
func answers(ctx context.Context, network, path string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, network, path)
	if err != nil {
		return err
	}
	return conn.Close()
}

func (e examination) files(context.Context) Check {
	const name = "open files"
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return warning(name, asRoot, "not looked at: %v", err)
	}
	// Beside the connections, each sandbox has a handful.
	if need := uint64(e.MaxConnections) + 1000; limit.Max < need {
		return warning(name, fmt.Sprintf("ulimit -Hn %d, or LimitNOFILE= of the systemd unit", max(need, 65536)),
			"at most %d in this session, and max-connections is %d", limit.Max, e.MaxConnections)
	}
	return ok(name, "at most %d", limit.Max)
}

func (e examination) group(context.Context) Check {
	if _, err := user.LookupGroup(e.Group); err != nil {
		return ok("group", "there is no group %s: only root can administer the server (to let others: groupadd --system %[1]s)", e.Group)
	}
	return ok("group", "members of %s can administer the server", e.Group)
}

// port looks for another server, or something else, where this one would be.
func (e examination) port(ctx context.Context) Check {
	const name = "address"
	running := answers(ctx, "unix", e.Socket)
	if running == nil {
		return ok(name, "%s; a server is running (socket %s)", e.Listen, e.Socket)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", e.Listen)
	switch {
	case errors.Is(err, unix.EADDRINUSE) && errors.Is(running, os.ErrPermission):
		return warning(name, asRoot, "%s is in use, maybe by msbd: this user may not open its socket %s", e.Listen, e.Socket)
	case errors.Is(err, unix.EADDRINUSE):
		return problem(name, "choose another with --port, or end what uses it: ss -ltnp", "%s is in use by another program", e.Listen)
	case errors.Is(err, unix.EACCES):
		return problem(name, "choose a port from 1024 on, or run as root", "%s: only root may listen there", e.Listen)
	case err != nil:
		return problem(name, "choose another with listen", "%v", err)
	}
	l.Close()
	return ok(name, "%s is free", e.Listen)
}

// plain leaves out the class of an error, which is for programs.
func plain(err error) string {
	text := strings.TrimSuffix(err.Error(), ": "+errdefs.ErrFailedPrecondition.Error())
	return strings.TrimSuffix(text, ": "+errdefs.ErrInvalidArgument.Error())
}
