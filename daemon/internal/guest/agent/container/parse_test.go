package container

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

func TestCapabilityMask(t *testing.T) {
	if got, err := capabilityMask([]string{"CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"}); err != nil || got != 1|1<<unix.CAP_SYS_ADMIN|1<<unix.CAP_CHECKPOINT_RESTORE {
		t.Errorf("got %#x, %v", got, err)
	}
	if _, err := capabilityMask([]string{"cap_chown"}); err == nil {
		t.Error("an unknown name was taken")
	}
	if len(capabilityNames) != unix.CAP_LAST_CAP+1 {
		t.Errorf("%d capabilities, the kernel has %d", len(capabilityNames), unix.CAP_LAST_CAP+1)
	}
}

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
		t.Errorf("no limits became %v", got)
	}
	for shares, want := range map[uint64]uint64{0: 1, 2: 1, 262144: 10000, 1 << 40: 10000} {
		if got := cpuWeight(shares); got != want {
			t.Errorf("weight of %d shares: got %d, want %d", shares, got, want)
		}
	}
}

func TestHomeOf(t *testing.T) {
	const passwd = "root:x:0:0:root:/root:/bin/sh\nshort:x\nodd:x:7:7::nowhere:/bin/sh\nlast:x:8:8::/home/last:/bin/sh"
	for uid, want := range map[uint32]string{0: "/root", 7: "/", 8: "/home/last", 9: "/"} {
		if got := homeOf(passwd, uid); got != want {
			t.Errorf("home of %d: got %q, want %q", uid, got, want)
		}
	}
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"run": 0o755, "data": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	env := []string{"PATH=/nosuch:" + dir}
	if got, err := lookPath("run", env); err != nil || got != filepath.Join(dir, "run") {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := lookPath("./x/run", env); err != nil || got != "./x/run" {
		t.Errorf("got %q, %v", got, err)
	}
	for _, name := range []string{"data", "absent"} {
		if got, err := lookPath(name, env); err == nil {
			t.Errorf("found %q", got)
		}
	}
}

func TestMakeMountpoint(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("below/target", filepath.Join(dir, "dangling")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("loop", filepath.Join(dir, "loop")); err != nil {
		t.Fatal(err)
	}
	got, err := makeMountpoint(filepath.Join(dir, "dangling"), false)
	if err != nil || got != filepath.Join(dir, "below/target") {
		t.Errorf("got %q, %v", got, err)
	}
	if st, err := os.Stat(filepath.Join(dir, "below/target")); err != nil || !st.Mode().IsRegular() {
		t.Errorf("target: %v, %v", st, err)
	}
	if _, err := makeMountpoint(filepath.Join(dir, "a/b"), true); err != nil {
		t.Error(err)
	}
	if _, err := makeMountpoint(filepath.Join(dir, "loop"), true); err == nil {
		t.Error("a loop of links was taken")
	}
}
