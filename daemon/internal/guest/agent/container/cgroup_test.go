package container

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
)

func TestParseIOStat(t *testing.T) {
	got := parseIOStat("254:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n\n8:0 \n")
	entry := func(op string, value uint64) *pb.BlkioStatsEntry {
		return &pb.BlkioStatsEntry{Major: 254, Minor: 16, Op: op, Value: value}
	}
	want := []*pb.BlkioStatsEntry{entry("read", 1), entry("write", 2), entry("rios", 3), entry("wios", 4)}
	if !slices.EqualFunc(got.IoServiceBytesRecursive, want, sameEntry) {
		t.Errorf("IoServiceBytesRecursive is %v, want %v", got.IoServiceBytesRecursive, want)
	}
	want = []*pb.BlkioStatsEntry{entry("Read", 3), entry("Write", 4)}
	if !slices.EqualFunc(got.IoServicedRecursive, want, sameEntry) {
		t.Errorf("IoServicedRecursive is %v, want %v", got.IoServicedRecursive, want)
	}
}

func sameEntry(a, b *pb.BlkioStatsEntry) bool { return a.String() == b.String() }

func TestCgroupSettings(t *testing.T) {
	got := cgroupSettings(&pb.LinuxResources{
		Memory: &pb.LinuxMemory{Limit: 1 << 20, Reservation: -1},
		CPU:    &pb.LinuxCPU{Shares: 1024, Quota: 50_000, Cpus: "0-1"},
		Pids:   &pb.LinuxPids{Limit: -1},
	})
	want := [][2]string{
		{"memory.max", "1048576"}, {"memory.low", "max"}, {"cpu.weight", "39"}, {"cpu.max", "50000 100000"},
		{"cpuset.cpus", "0-1"}, {"pids.max", "max"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := cgroupSettings(nil); got != nil {
		t.Errorf("cgroupSettings(nil) = %v, want nil", got)
	}
	for shares, want := range map[uint64]uint64{0: 1, 2: 1, 262144: 10000, 1 << 40: 10000} {
		if got := cpuWeight(shares); got != want {
			t.Errorf("cpuWeight(%d) = %d, want %d", shares, got, want)
		}
	}
}

func TestLoadLimit(t *testing.T) {
	for _, tt := range []struct{ file, value, want string }{
		{"memory.max", "134217728", "100663296"}, // 128 MiB less 32 MiB
		{"memory.max", "16777216", "12582912"},
		{"memory.max", "max", "max"},
		{"pids.max", "max", "500"},
		{"pids.max", "501", "500"},
		{"pids.max", "200", "200"},
		{"cpu.max", "100000 100000", "100000 100000"},
	} {
		if got := loadLimit(tt.file, tt.value, 1000); got != tt.want {
			t.Errorf("loadLimit(%s, %s) = %s, want %s", tt.file, tt.value, got, tt.want)
		}
	}
}
