package container

import (
	"bufio"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
)

// stats returns the resource usage of the cgroup. Times are in nanoseconds, sizes in bytes.
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
	addV1Names(memory)
	io, err := os.ReadFile(c.path + "/io.stat")
	if err != nil && !os.IsNotExist(err) {
		return nil, err
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
		BlkioStats: parseIOStat(string(io)),
	}, nil
}

// addV1Names adds the figures that the shim looks up under their cgroup version 1 names, so that its statistics work on
// hosts with either version.
func addV1Names(memory map[string]uint64) {
	for name, parts := range map[string][]string{
		"cache": {"file"}, "rss": {"anon"}, "mapped_file": {"file_mapped"}, "total_inactive_file": {"inactive_file"},
		"workingset_refault":  {"workingset_refault_anon", "workingset_refault_file"},
		"workingset_activate": {"workingset_activate_anon", "workingset_activate_file"},
	} {
		for _, part := range parts {
			memory[name] += memory[part]
		}
	}
}

// parseIOStat parses lines such as "254:0 rbytes=1 wbytes=2 rios=3 wios=4". For cgroup version 2 statistics, the shim
// reads both bytes and operation counts from IoServiceBytesRecursive. For version 1 it reads the counts from
// IoServicedRecursive. So the counts are in both lists.
func parseIOStat(stat string) *pb.BlkioStats {
	s := &pb.BlkioStats{}
	for line := range strings.Lines(stat) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		major, minor, _ := strings.Cut(fields[0], ":")
		entry := func(op, value string) *pb.BlkioStatsEntry {
			e := &pb.BlkioStatsEntry{Op: op}
			e.Major, _ = strconv.ParseUint(major, 10, 32)
			e.Minor, _ = strconv.ParseUint(minor, 10, 32)
			e.Value, _ = strconv.ParseUint(value, 10, 64)
			return e
		}
		for _, field := range fields[1:] {
			key, value, _ := strings.Cut(field, "=")
			if op := map[string]string{"rbytes": "read", "wbytes": "write", "rios": "rios", "wios": "wios"}[key]; op != "" {
				s.IoServiceBytesRecursive = append(s.IoServiceBytesRecursive, entry(op, value))
			}
			if op := map[string]string{"rios": "Read", "wios": "Write"}[key]; op != "" {
				s.IoServicedRecursive = append(s.IoServicedRecursive, entry(op, value))
			}
		}
	}
	return s
}

// value returns the number in the cgroup's file. It returns 0 if the kernel does not have the file, and math.MaxUint64
// for "max", which means no limit.
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

// readKeyed reads the file at path, which has lines of the form "name number". It skips other lines.
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
