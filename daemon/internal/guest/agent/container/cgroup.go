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

// cgroup is a container's cgroup (version 2). The container may have created more cgroups below it.
type cgroup struct {
	path string
	dir  *os.File // to fork processes directly into the cgroup
	oom  *oomWatch
}

// createCgroup creates the cgroup of container id.
func createCgroup(id string) (*cgroup, error) {
	// The prefix makes the name different from the kernel's files in the directory.
	path := filepath.Join(CgroupRoot, "container-"+id)
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	oom, err := watchOOM(path + "/memory.events")
	if err != nil {
		return nil, errors.Join(err, dir.Close(), os.Remove(path))
	}
	return &cgroup{path, dir, oom}, nil
}

// limit applies the limits in r. Limits that r leaves out stay as they are. Huge page limits are ignored, because this
// guest reserves no huge pages.
func (c *cgroup) limit(r *pb.LinuxResources) error {
	for _, setting := range cgroupSettings(r) {
		file := filepath.Join(c.path, setting[0])
		if err := os.WriteFile(file, []byte(setting[1]), 0); err != nil {
			return fmt.Errorf("set %s to %s: %w", setting[0], setting[1], err)
		}
	}
	return nil
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

// forkInto returns the directory of the cgroup into which to fork an additional process of the container. main is the
// pid of the container's main process. A cgroup that has delegated its controllers cannot hold processes. In that case,
// forkInto returns the cgroup of the main process.
func (c *cgroup) forkInto(main int) (*os.File, error) {
	delegated, err := os.ReadFile(c.path + "/cgroup.subtree_control")
	if err != nil {
		return nil, err
	}
	if len(strings.TrimSpace(string(delegated))) == 0 {
		return os.Open(c.path)
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
