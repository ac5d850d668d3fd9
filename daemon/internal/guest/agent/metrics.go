package agent

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/agent/network"
)

// GetMetrics returns metrics of the guest in Prometheus's text format, with the names that Kata's agent uses.
func (a *agent) GetMetrics(context.Context, *pb.GetMetricsRequest) (*pb.Metrics, error) {
	var b strings.Builder
	for file, write := range map[string]func(io.Writer, *bufio.Scanner){
		"/proc/meminfo":   writeMeminfo,
		"/proc/stat":      writeCPUTime,
		"/proc/diskstats": writeDiskstats,
	} {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		write(&b, bufio.NewScanner(f))
		f.Close()
	}
	if err := writeNetwork(&b); err != nil {
		return nil, err
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return nil, err
	}
	metricFamily(&b, "load", "gauge")
	for i, item := range []string{"load1", "load5", "load15"} {
		fmt.Fprintf(&b, "kata_guest_load{item=%q} %.2f\n", item, float64(info.Loads[i])/(1<<16))
	}
	metricFamily(&b, "tasks", "gauge")
	fmt.Fprintf(&b, "kata_guest_tasks{item=\"max\"} %d\n", info.Procs)
	metricFamily(&b, "uptime_seconds", "counter")
	fmt.Fprintf(&b, "kata_guest_uptime_seconds %d\n", info.Uptime)
	fmt.Fprintf(&b, "# TYPE go_goroutines gauge\ngo_goroutines %d\n", runtime.NumGoroutine())
	return &pb.Metrics{Metrics: b.String()}, nil
}

func metricFamily(w io.Writer, name, kind string) {
	fmt.Fprintf(w, "# TYPE kata_guest_%s %s\n", name, kind)
}

func writeMeminfo(w io.Writer, lines *bufio.Scanner) {
	metricFamily(w, "meminfo", "gauge")
	for lines.Scan() {
		if name, size, ok := parseMeminfo(lines.Text()); ok {
			fmt.Fprintf(w, "kata_guest_meminfo{item=%q} %d\n", metricItem(name), size)
		}
	}
}

// parseMeminfo parses a line such as "MemFree:  123 kB" or "HugePages_Free:  1". It converts kB to bytes.
func parseMeminfo(line string) (name string, size uint64, ok bool) {
	name, rest, ok := strings.Cut(line, ":")
	fields := strings.Fields(rest)
	if !ok || len(fields) == 0 {
		return "", 0, false
	}
	size, err := strconv.ParseUint(fields[0], 10, 54)
	if len(fields) > 1 {
		size <<= 10
	}
	return name, size, err == nil
}

// metricItem converts a name of the kernel to the name that Kata's agent uses: MemTotal to mem_total, Active(file) to
// active_file.
func metricItem(name string) string {
	var b strings.Builder
	inWord := false // whether the last rune was a lower-case letter, so that a capital letter begins a new word
	for _, r := range strings.TrimSuffix(strings.ReplaceAll(name, "HugePages", "Hugepages"), ")") {
		switch {
		case 'A' <= r && r <= 'Z':
			if inWord {
				b.WriteByte('_')
			}
			b.WriteRune(r + 'a' - 'A')
			inWord = false
		case r == '(':
			b.WriteByte('_')
			inWord = false
		default:
			b.WriteRune(r)
			inWord = 'a' <= r && r <= 'z'
		}
	}
	return b.String()
}

// writeCPUTime writes the times of each processor, in seconds.
func writeCPUTime(w io.Writer, lines *bufio.Scanner) {
	const ticksPerSecond = 100 // USER_HZ, the unit in which the kernel reports times to programs
	items := []string{"user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice"}
	metricFamily(w, "cpu_time", "counter")
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		cpu, ok := strings.CutPrefix(lines.Text(), "cpu")
		if !ok || len(fields) < 2 {
			continue
		}
		cpu, _, _ = strings.Cut(cpu, " ")
		if cpu == "" {
			cpu = "total"
		}
		for i, item := range items[:min(len(items), len(fields)-1)] {
			n, _ := strconv.ParseUint(fields[i+1], 10, 64)
			fmt.Fprintf(w, "kata_guest_cpu_time{cpu=%q,item=%q} %.2f\n", cpu, item, float64(n)/ticksPerSecond)
		}
	}
}

func writeDiskstats(w io.Writer, lines *bufio.Scanner) {
	items := []string{"reads", "merged", "sectors_read", "time_reading", "writes", "writes_merged",
		"sectors_written", "time_writing", "in_progress", "time_in_progress", "weighted_time_in_progress"}
	metricFamily(w, "diskstat", "gauge")
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 3+len(items) {
			continue
		}
		for i, item := range items {
			n, _ := strconv.ParseUint(fields[3+i], 10, 64)
			fmt.Fprintf(w, "kata_guest_diskstat{disk=%q,item=%q} %d\n", fields[2], item, n)
		}
	}
}

func writeNetwork(w io.Writer) error {
	interfaces, err := network.Stats()
	if err != nil {
		return err
	}
	metricFamily(w, "netdev_stat", "counter")
	for _, i := range interfaces {
		for _, s := range []struct {
			item string
			n    uint64
		}{
			{"recv_bytes", i.RxBytes}, {"recv_packets", i.RxPackets}, {"recv_errs", i.RxErrors}, {"recv_drop", i.RxDropped},
			{"sent_bytes", i.TxBytes}, {"sent_packets", i.TxPackets}, {"sent_errs", i.TxErrors}, {"sent_drop", i.TxDropped},
		} {
			fmt.Fprintf(w, "kata_guest_netdev_stat{interface=%q,item=%q} %d\n", i.Name, s.item, s.n)
		}
	}
	return nil
}
