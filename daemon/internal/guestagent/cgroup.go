package guestagent

import (
	"bufio"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

// cgroup is a container's control group (version 2).
type cgroup struct {
	path string
	dir  *os.File // for a fork straight into the group
	oom  *os.File
}

func createCgroup(id string) (*cgroup, error) {
	// The prefix keeps an id from being one of the directory's own files.
	path := filepath.Join(cgroupRoot, "container-"+id)
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	oom, err := openOOMWatch(path)
	if err != nil {
		return nil, errors.Join(err, dir.Close(), os.Remove(path))
	}
	return &cgroup{path, dir, oom}, nil
}

// limit applies what r asks for; what it leaves out stays as it is.
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

// kill ends every process in the group.
func (c *cgroup) kill() error { return os.WriteFile(c.path+"/cgroup.kill", []byte("1"), 0) }

// freeze stops or continues every process in the group.
func (c *cgroup) freeze(frozen bool) error {
	value := "0"
	if frozen {
		value = "1"
	}
	return os.WriteFile(c.path+"/cgroup.freeze", []byte(value), 0)
}

// pids returns the processes in the group.
func (c *cgroup) pids() ([]int, error) {
	data, err := os.ReadFile(c.path + "/cgroup.procs")
	if err != nil {
		return nil, err
	}
	var pids []int
	for field := range strings.FieldsSeq(string(data)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// remove kills what is left and removes the group, within limit.
func (c *cgroup) remove(limit time.Duration) error {
	for end := time.Now().Add(limit); ; time.Sleep(2 * time.Millisecond) {
		if err := c.kill(); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		err := os.Remove(c.path)
		if err == nil || errors.Is(err, os.ErrNotExist) {
			return errors.Join(c.dir.Close(), c.oom.Close())
		}
		// Busy until the kernel has taken the last process out.
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return err
		}
	}
}

// watchOOM calls killed whenever the kernel killed a process for want of memory, until the group is
// removed.
func (c *cgroup) watchOOM(killed func()) {
	events := c.path + "/memory.events"
	var seen uint64
	buf := make([]byte, 4096)
	for {
		if _, err := c.oom.Read(buf); err != nil {
			return
		}
		values, err := readKeyed(events)
		if err != nil {
			return
		}
		if n := values["oom_kill"]; n > seen {
			seen = n
			killed()
		}
	}
}

// openOOMWatch returns a file that can be read whenever a group's memory.events changed.
func openOOMWatch(path string) (*os.File, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	watch := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, path+"/memory.events", unix.IN_MODIFY); err != nil {
		watch.Close()
		return nil, err
	}
	return watch, nil
}

// stats reads what the group uses. Times are in nanoseconds, sizes in bytes.
func (c *cgroup) stats() (*pb.CgroupStats, error) {
	cpu, err := readKeyed(c.path + "/cpu.stat")
	if err != nil {
		return nil, err
	}
	memory, err := readKeyed(c.path + "/memory.stat")
	if err != nil {
		return nil, err
	}
	events, err := readKeyed(c.path + "/memory.events")
	if err != nil {
		return nil, err
	}
	// The shim fills version 1 metrics from version 1 names.
	for v1, v2 := range map[string]string{
		"cache": "file", "rss": "anon", "mapped_file": "file_mapped", "total_inactive_file": "inactive_file",
	} {
		memory[v1] = memory[v2]
	}
	return &pb.CgroupStats{
		CpuStats: &pb.CpuStats{
			CpuUsage: &pb.CpuUsage{
				TotalUsage:        cpu["usage_usec"] * 1000,
				UsageInUsermode:   cpu["user_usec"] * 1000,
				UsageInKernelmode: cpu["system_usec"] * 1000,
			},
			ThrottlingData: &pb.ThrottlingData{
				Periods:          cpu["nr_periods"],
				ThrottledPeriods: cpu["nr_throttled"],
				ThrottledTime:    cpu["throttled_usec"] * 1000,
			},
		},
		MemoryStats: &pb.MemoryStats{
			Cache: memory["file"],
			Usage: &pb.MemoryData{
				Usage:    c.value("memory.current"),
				MaxUsage: c.value("memory.peak"),
				Limit:    c.value("memory.max"),
				Failcnt:  events["max"],
			},
			KernelUsage: &pb.MemoryData{Usage: memory["kernel"]},
			SwapUsage:   &pb.MemoryData{Usage: c.value("memory.swap.current"), Limit: c.value("memory.swap.max")},
			Stats:       memory,
		},
		PidsStats:  &pb.PidsStats{Current: c.value("pids.current"), Limit: c.value("pids.max")},
		BlkioStats: &pb.BlkioStats{},
	}, nil
}

// value reads a file of one number. What the kernel does not count is 0; no limit is the largest.
func (c *cgroup) value(file string) uint64 {
	data, err := os.ReadFile(filepath.Join(c.path, file))
	if err != nil {
		return 0
	}
	text := strings.TrimSpace(string(data))
	if text == "max" {
		return math.MaxUint64
	}
	n, _ := strconv.ParseUint(text, 10, 64)
	return n
}

// readKeyed reads a file of lines "name number".
func readKeyed(path string) (map[string]uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	values := make(map[string]uint64)
	scanner := bufio.NewScanner(f)
	for scanner.Scan() {
		key, value, _ := strings.Cut(scanner.Text(), " ")
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			continue
		}
		values[key] = n
	}
	return values, scanner.Err()
}
