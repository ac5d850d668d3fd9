package agent

import (
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/msbd/msbd/daemon/internal/guest/agent/mount"
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

func TestParseMeminfo(t *testing.T) {
	if name, size, ok := parseMeminfo("MemFree:      123 kB"); name != "MemFree" || size != 123<<10 || !ok {
		t.Errorf("got %q, %d, %v", name, size, ok)
	}
	if _, size, ok := parseMeminfo("HugePages_Free:     4"); size != 4 || !ok {
		t.Errorf("got %d, %v", size, ok)
	}
	for _, bad := range []string{"", "x", "x:", "x: y"} {
		if _, _, ok := parseMeminfo(bad); ok {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestMetricItem(t *testing.T) {
	for name, want := range map[string]string{
		"MemTotal": "mem_total", "Active(anon)": "active_anon", "HugePages_Total": "hugepages_total",
		"SReclaimable": "sreclaimable", "Cached": "cached", "DirectMap4k": "direct_map4k",
	} {
		if got := metricItem(name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

func TestValidateCreate(t *testing.T) {
	if err := validateCreate(&pb.CreateContainerRequest{ContainerId: "a", OCI: buildSpec("a")}); err != nil {
		t.Error(err)
	}
	for name, change := range badCreates("a") {
		req := &pb.CreateContainerRequest{ContainerId: "a", OCI: buildSpec("a")}
		change(req)
		if len(req.Storages) > 0 {
			continue // refused when attached
		}
		if err := validateCreate(req); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzAgentRequests decodes requests and checks and plans them as far as nothing is touched.
func FuzzAgentRequests(f *testing.F) {
	good := &pb.CreateContainerRequest{ContainerId: "a", OCI: buildSpec("a"), Storages: []*pb.Storage{{Driver: "blk", Source: "02/01", Options: []string{"ro", "mode=777"}}}}
	seeds := []*pb.CreateContainerRequest{good}
	for _, change := range badCreates("a") {
		bad := proto.Clone(good).(*pb.CreateContainerRequest)
		change(bad)
		seeds = append(seeds, bad)
	}
	for _, s := range seeds {
		data, err := proto.Marshal(s)
		if err != nil {
			continue // a name that is no UTF-8
		}
		f.Add(data)
	}
	for _, req := range goodRequests() {
		for _, change := range pick(rand.New(rand.NewPCG(0, 0)), mutations(req), 8) {
			if data, err := encode(mutated(req, change)); err == nil && len(data) < 16<<10 {
				f.Add(data)
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var create pb.CreateContainerRequest
		if proto.Unmarshal(data, &create) == nil {
			err := validateCreate(&create)
			if err != nil && !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err) {
				t.Errorf("error of no class: %v", err)
			}
			if err == nil {
				checkAccepted(t, &create)
			}
			for _, m := range create.GetOCI().GetMounts() {
				mount.ParseOptions(m.GetOptions()).Flags()
			}
			cgroupSettings(create.GetOCI().GetLinux().GetResources())
		}
		var exec pb.ExecProcessRequest
		if proto.Unmarshal(data, &exec) == nil && validateProcess(exec.Process) == nil && exec.Process.User.GetUID() == math.MaxUint32 {
			t.Errorf("accepted user %d, who would be root", exec.Process.User.UID)
		}
	})
}

// checkAccepted asserts what a child relies on.
func checkAccepted(t *testing.T, req *pb.CreateContainerRequest) {
	t.Helper()
	if strings.ContainsAny(req.ContainerId, "/\x00") || req.ContainerId == "" || req.ContainerId[0] == '.' {
		t.Errorf("accepted container id %q", req.ContainerId)
	}
	deviceProgram(deviceRules(req.OCI.Linux))
	if len(req.OCI.Process.Args) == 0 {
		t.Errorf("accepted %v", req)
	}
	for _, m := range req.OCI.Mounts {
		if m.Type == guestMountType && m.Source != "/msb-portal" {
			t.Errorf("accepted a mount of the guest's %q", m.Source)
		}
	}
}
