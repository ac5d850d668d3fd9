package container

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

// CgroupRoot is where the guest's cgroup2 file system is mounted.
const CgroupRoot = "/sys/fs/cgroup"

const (
	// portalMemory is the memory in bytes that is reserved for the portal. msb-portal serve and connect together use
	// 5 to 18 MiB, and each of the two transfers that there may be uses 7 MiB, with its pipe.
	portalMemory = 32 << 20
	// portalWeight is the portal's share of the processors while they are busy, relative to the 100 of the load. It is
	// the maximum.
	portalWeight = 10_000
	// portalOOMScoreAdj makes the kernel kill a process of the portal only if nothing else can be killed.
	portalOOMScoreAdj = -999
	// maxCgroups is how many cgroups there can be below the load. The portal creates two for each program that it starts,
	// and a root process in the container could create more.
	maxCgroups = 4096
)

// cgroup is a container's cgroup (version 2). The container may have created more cgroups below it.
//
// If the container's main process is the portal, the cgroup has no processes itself, but two cgroups below it: "portal"
// with the portal's processes, and "load" with all others. The load cannot use the memory that is reserved for the
// portal, and the portal comes first when the processors are busy. So whatever the load does, the portal responds. The
// device filter and the statistics are those of the whole container.
//
// Below the load is the cgroup "processes", in which the portal creates a cgroup for each program, so that it can end
// everything that the program started. It limits the number of processes in each of them, and the programs share the
// processors equally, however many processes each has. All other limits are those of the load, and apply to all programs
// together.
type cgroup struct {
	path   string
	load   string // path of the cgroup for the container's processes other than the portal; path, if portal is empty
	portal string // path of the cgroup for the portal's processes; empty if the container does not run the portal
	dir    *os.File
	oom    *oomWatch
}

// createCgroup creates the cgroup of container id. portal is true if its main process is the portal.
func createCgroup(id string, portal bool) (*cgroup, error) {
	// The prefix makes the name different from the kernel's files in the directory.
	path := filepath.Join(CgroupRoot, "container-"+id)
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	oom, err := watchOOM(path)
	if err != nil {
		return nil, errors.Join(err, dir.Close(), os.Remove(path))
	}
	c := &cgroup{path: path, load: path, dir: dir, oom: oom}
	if portal {
		if err := c.separatePortal(); err != nil {
			return nil, errors.Join(err, c.remove(removeTimeout))
		}
	}
	return c, nil
}

// separatePortal creates the cgroups "portal" and "load", and "processes" below the load.
func (c *cgroup) separatePortal() error {
	c.load, c.portal = c.path+"/load", c.path+"/portal"
	for _, dir := range []string{c.load, c.portal, c.processes(), c.execs()} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	for _, setting := range [][3]string{
		{c.path, "cgroup.subtree_control", "+cpu +memory +pids"},
		{c.load, "cgroup.subtree_control", "+cpu +pids"},
		{c.processes(), "cgroup.subtree_control", "+cpu +pids"},
		// A cgroup is protected only as far as the one above it is.
		{c.path, "memory.min", strconv.Itoa(portalMemory)},
		{c.portal, "memory.min", strconv.Itoa(portalMemory)},
		{c.portal, "cpu.weight", strconv.Itoa(portalWeight)},
		{c.load, "cgroup.max.descendants", strconv.Itoa(maxCgroups)},
	} {
		if err := writeSetting(setting[0], setting[1], setting[2]); err != nil {
			return err
		}
	}
	return c.limitLoad("pids.max", "max") // in case the spec has no limit
}

// limit applies the limits in r. Limits that r leaves out stay as they are. Huge page limits are ignored, because this
// guest reserves no huge pages.
func (c *cgroup) limit(r *pb.LinuxResources) error {
	for _, setting := range cgroupSettings(r) {
		file, value := setting[0], setting[1]
		limitsLoad := c.portal != "" && (file == "cpu.max" || file == "pids.max")
		if !limitsLoad {
			if err := writeSetting(c.path, file, value); err != nil {
				return err
			}
		}
		if limitsLoad || c.portal != "" && file == "memory.max" {
			if err := c.limitLoad(file, value); err != nil {
				return err
			}
		}
	}
	return nil
}

// limitLoad applies a limit of the container to the load.
func (c *cgroup) limitLoad(file, value string) error {
	threads, err := maxThreads()
	if err != nil {
		return err
	}
	return writeSetting(c.load, file, loadLimit(file, value, threads))
}

// loadLimit returns the limit of the load for a limit of the container. It leaves memory for the portal, and half of the
// threads that the guest's kernel can have for the portal and the agent. The memory of the threads themselves counts as
// that of the load.
func loadLimit(file, value string, threads uint64) string {
	limit, err := strconv.ParseUint(value, 10, 64)
	switch {
	case file == "memory.max" && err == nil:
		return strconv.FormatUint(limit-min(limit/4, portalMemory), 10)
	case file == "pids.max" && (err != nil || limit > threads/2): // err means no limit
		return strconv.FormatUint(threads/2, 10)
	}
	return value
}

const (
	threadsMax = "/proc/sys/kernel/threads-max"
	pidMax     = "/proc/sys/kernel/pid_max"
)

// maxThreads returns how many threads the guest's kernel can have.
func maxThreads() (uint64, error) {
	threads, err := readNumber(threadsMax)
	if err != nil {
		return 0, err
	}
	pids, err := readNumber(pidMax)
	return min(threads, pids), err
}

// RaiseProcessLimits lets the guest's kernel have twice as many threads as it derives from the memory, so that one program
// can have as many, and others remain for the programs that start later. The kernel would also limit the processes of each user
// other than root. Then a user whose program uses them up could start no other program, so the cgroups alone limit them.
// The caller must call it once, at boot.
func RaiseProcessLimits() error {
	threads, err := readNumber(threadsMax)
	if err != nil {
		return err
	}
	if err := os.WriteFile(threadsMax, []byte(strconv.FormatUint(2*threads, 10)), 0); err != nil {
		return err
	}
	infinite := &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	return os.NewSyscallError("setrlimit", unix.Setrlimit(unix.RLIMIT_NPROC, infinite))
}

func readNumber(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
}

func writeSetting(dir, file, value string) error {
	if err := os.WriteFile(filepath.Join(dir, file), []byte(value), 0); err != nil {
		return fmt.Errorf("set %s to %s: %w", file, value, err)
	}
	return nil
}

// protect moves the process pid, which is the portal's, to the portal's cgroup.
func (c *cgroup) protect(pid int) error {
	return writeSetting(c.portal, "cgroup.procs", strconv.Itoa(pid))
}

// processes returns the path of the cgroup below the load in which the portal creates cgroups.
func (c *cgroup) processes() string { return c.load + "/processes" }

// handOver returns two descriptors for the portal, which runs as user uid. Through the first one, it reads the container's
// cgroup and starts processes in the load. Through the second one, it creates and removes cgroups in "processes", and ends
// what is in them. The directories are mounts of their own, because the programs in the container may be able to open the
// portal's descriptors: no path leads from them to other cgroups. In the first one, nothing can be changed. In the second
// one are no limits but those that the portal sets for its programs, and there can be maxCgroups cgroups at most. The portal
// hides its descriptors from the programs, so that they cannot change their limits.
func (c *cgroup) handOver(uid uint32) (files []*os.File, err error) {
	// To start a process in another cgroup, one must be allowed to write to these files. The mounts do not matter.
	for _, name := range []string{
		c.path + "/cgroup.procs", c.load + "/cgroup.procs", c.processes(), c.processes() + "/cgroup.procs",
	} {
		if err := os.Chown(name, int(uid), -1); err != nil {
			return nil, err
		}
	}
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	for _, path := range []string{c.path, c.processes()} {
		tree, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return files, os.NewSyscallError("open_tree", err)
		}
		files = append(files, os.NewFile(uintptr(tree), path))
	}
	set := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(int(files[0].Fd()), "", unix.AT_EMPTY_PATH, set); err != nil {
		return files, os.NewSyscallError("mount_setattr", err)
	}
	return files, nil
}

// cgroupSettings translates OCI limits to pairs of a cgroup file and the value to write to it.
func cgroupSettings(r *pb.LinuxResources) [][2]string {
	var s [][2]string
	set := func(file, value string) { s = append(s, [2]string{file, value}) }
	amount := func(n int64) string {
		if n < 0 {
			return "max"
		}
		return strconv.FormatInt(n, 10)
	}
	if m := r.GetMemory(); m != nil {
		if m.Limit != 0 {
			set("memory.max", amount(m.Limit))
		}
		if m.Reservation != 0 {
			set("memory.low", amount(m.Reservation))
		}
		// OCI's Swap limits the sum of memory and swap. The kernel's file limits swap alone.
		switch {
		case m.Swap < 0:
			set("memory.swap.max", "max")
		case m.Swap > 0 && m.Limit > 0 && m.Swap >= m.Limit:
			set("memory.swap.max", amount(m.Swap-m.Limit))
		}
	}
	if c := r.GetCPU(); c != nil {
		if c.Shares != 0 {
			set("cpu.weight", strconv.FormatUint(cpuWeight(c.Shares), 10))
		}
		if c.Quota != 0 || c.Period != 0 {
			quota, period := "max", uint64(100_000)
			if c.Quota > 0 {
				quota = strconv.FormatInt(c.Quota, 10)
			}
			if c.Period != 0 {
				period = c.Period
			}
			set("cpu.max", fmt.Sprintf("%s %d", quota, period))
		}
		if c.Cpus != "" {
			set("cpuset.cpus", c.Cpus)
		}
		if c.Mems != "" {
			set("cpuset.mems", c.Mems)
		}
	}
	if p := r.GetPids(); p != nil && p.Limit != 0 {
		set("pids.max", amount(p.Limit))
	}
	return s
}

// cpuWeight converts CPU shares (2 to 262144) to a weight (1 to 10000), with the formula that other runtimes use.
func cpuWeight(shares uint64) uint64 {
	shares = min(max(shares, 2), 262144)
	return 1 + (shares-2)*9999/262142
}

// kill kills every process in the cgroup and those below it.
func (c *cgroup) kill() error { return os.WriteFile(c.path+"/cgroup.kill", []byte("1"), 0) }

// freeze freezes or unfreezes every process in the cgroup and those below it.
func (c *cgroup) freeze(frozen bool) error {
	value := "0"
	if frozen {
		value = "1"
	}
	return os.WriteFile(c.path+"/cgroup.freeze", []byte(value), 0)
}

// execs returns the path of the cgroup below the load for additional processes that are not the portal's.
func (c *cgroup) execs() string { return c.load + "/execs" }

// forkInto returns the directory of the cgroup into which to fork an additional process of the container. main is the
// pid of the container's main process. A cgroup that has delegated its controllers cannot hold processes. In that case,
// forkInto returns the cgroup of the main process.
func (c *cgroup) forkInto(main int) (*os.File, error) {
	if c.portal != "" {
		return os.Open(c.execs())
	}
	delegated, err := os.ReadFile(c.load + "/cgroup.subtree_control")
	if err != nil {
		return nil, err
	}
	if len(strings.TrimSpace(string(delegated))) == 0 {
		return os.Open(c.load)
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", main))
	if err != nil {
		return nil, err
	}
	_, path, _ := strings.Cut(strings.TrimSpace(string(line)), "::")
	path = filepath.Join(CgroupRoot, path)
	if !strings.HasPrefix(path+"/", c.path+"/") {
		return nil, fmt.Errorf("the container's main process is in the cgroup %s, outside the container's cgroup", path)
	}
	return os.Open(path)
}

// remove kills the processes in the cgroup and removes it with all cgroups below it. It gives up after timeout.
func (c *cgroup) remove(timeout time.Duration) error {
	for end := time.Now().Add(timeout); ; time.Sleep(2 * time.Millisecond) {
		if err := c.kill(); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		c.oom.check() // report the last OOM kills before the counter is gone
		err := removeGroups(c.path)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return errors.Join(c.dir.Close(), c.oom.Close())
		}
		// The cgroup is busy until the kernel has removed the last process from it.
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return err
		}
	}
}

// removeGroups removes the cgroup at path and all cgroups below it.
func removeGroups(path string) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeGroups(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.Remove(path)
}

// empty reports whether the cgroup and those below it have no processes.
func (c *cgroup) empty() bool {
	events, err := readKeyed(c.path + "/cgroup.events")
	return err != nil || events["populated"] == 0
}
