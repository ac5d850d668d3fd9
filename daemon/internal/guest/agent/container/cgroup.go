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

// CgroupRoot is where the guest's control groups (version 2) are mounted.
const CgroupRoot = "/sys/fs/cgroup"

// cgroup is a container's control group (version 2). The container may have made more of them below.
type cgroup struct {
	path string
	dir  *os.File // for a fork straight into the group
	oom  *oomWatch
}

func createCgroup(id string) (*cgroup, error) {
	// The prefix keeps an id from being one of the directory's own files.
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

// limit applies the limits in r. What r leaves out stays as it is, and limits of huge pages are ignored:
// this guest reserves none.
func (c *cgroup) limit(r *pb.LinuxResources) error {
	for _, setting := range cgroupSettings(r) {
		file := filepath.Join(c.path, setting[0])
		if err := os.WriteFile(file, []byte(setting[1]), 0); err != nil {
			return fmt.Errorf("set %s to %s: %w", setting[0], setting[1], err)
		}
	}
	return nil
}

// cgroupSettings translates OCI limits to pairs of a file and its content.
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
		// OCI's limit is of memory and swap together.
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

// cpuWeight maps shares (2 to 262144) to a weight (1 to 10000), as every runtime does.
func cpuWeight(shares uint64) uint64 {
	shares = min(max(shares, 2), 262144)
	return 1 + (shares-2)*9999/262142
}

// kill ends every process in the group and below.
func (c *cgroup) kill() error { return os.WriteFile(c.path+"/cgroup.kill", []byte("1"), 0) }

// freeze stops or continues every process in the group and below.
func (c *cgroup) freeze(frozen bool) error {
	value := "0"
	if frozen {
		value = "1"
	}
	return os.WriteFile(c.path+"/cgroup.freeze", []byte(value), 0)
}

// forkInto returns the directory of the group into which to fork a process that joins the container of
// process main. A group that delegated its controllers can hold no process, so the group of main is used.
func (c *cgroup) forkInto(main int) (*os.File, error) {
	handed, err := os.ReadFile(c.path + "/cgroup.subtree_control")
	if err != nil {
		return nil, err
	}
	if len(strings.TrimSpace(string(handed))) == 0 {
		return os.Open(c.path)
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", main))
	if err != nil {
		return nil, err
	}
	_, path, _ := strings.Cut(strings.TrimSpace(string(line)), "::")
	path = filepath.Join(CgroupRoot, path)
	if !strings.HasPrefix(path+"/", c.path+"/") {
		return nil, fmt.Errorf("the container's main process is in the group %s", path)
	}
	return os.Open(path)
}

// remove kills what is left and removes the group with all below, within limit.
func (c *cgroup) remove(limit time.Duration) error {
	for end := time.Now().Add(limit); ; time.Sleep(2 * time.Millisecond) {
		if err := c.kill(); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		c.oom.check() // the last chance
		err := removeGroups(c.path)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return errors.Join(c.dir.Close(), c.oom.Close())
		}
		// Busy until the kernel has taken the last process out.
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return err
		}
	}
}

// removeGroups removes a group after those below it.
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

// empty reports whether no process is left in the group and below.
func (c *cgroup) empty() bool {
	events, err := readKeyed(c.path + "/cgroup.events")
	return err != nil || events["populated"] == 0
}
