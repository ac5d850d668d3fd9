package container

import (
	"math"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/msbd/msbd/daemon/internal/guest/agent/mount"
)

// fullSpec returns a valid spec that uses every part that the agent reads.
func fullSpec() *pb.Spec {
	caps := []string{"CAP_CHOWN", "CAP_KILL"}
	return &pb.Spec{
		Root:     &pb.Root{Path: "/run/kata-containers/shared/containers/a/rootfs", Readonly: true},
		Hostname: "box",
		Process: &pb.Process{
			User: &pb.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{5}},
			Args: []string{"/tool", "wait"}, Env: []string{"PATH=/bin"}, Cwd: "/srv",
			Capabilities: &pb.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
			Rlimits:      []*pb.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 2048}},
		},
		Mounts: []*pb.Mount{
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/.msb/portal", Type: guestMountType, Source: "/msb-portal", Options: []string{"ro"}},
		},
		Linux: &pb.Linux{
			Devices: []*pb.LinuxDevice{{Path: "/dev/x", Type: "c", Major: 1, Minor: 3, FileMode: 0o666}},
			Resources: &pb.LinuxResources{
				Devices: []*pb.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}, {Allow: true, Type: "b", Major: 8, Minor: -1, Access: "r"}},
				Memory:  &pb.LinuxMemory{Limit: 96 << 20, Swap: 128 << 20},
				CPU:     &pb.LinuxCPU{Shares: 1024, Quota: 150_000, Period: 100_000, Cpus: "0-1"},
				Pids:    &pb.LinuxPids{Limit: 100},
			},
			MaskedPaths:   []string{"/proc/kcore"},
			ReadonlyPaths: []string{"/proc/sys"},
			Sysctl:        map[string]string{"net.ipv4.ip_unprivileged_port_start": "80"},
		},
	}
}

func TestFullSpecIsValid(t *testing.T) {
	if err := Validate("a", fullSpec()); err != nil {
		t.Error(err)
	}
}

// FuzzSpec decodes and validates specs, and runs the parts of building a container that do not change the machine.
func FuzzSpec(f *testing.F) {
	for _, change := range []func(*pb.Spec){
		func(*pb.Spec) {},
		func(s *pb.Spec) { s.Process = nil },
		func(s *pb.Spec) { s.Process.User.UID = math.MaxUint32 },
		func(s *pb.Spec) { s.Process.Args[0] = "a\x00b" },
		func(s *pb.Spec) { s.Mounts[1].Source = "/init" },
		func(s *pb.Spec) { s.Linux.Devices[0].Major = math.MaxInt64 },
		func(s *pb.Spec) { s.Linux.Resources.Devices[1].Major = math.MinInt64 },
		func(s *pb.Spec) { s.Linux.Sysctl = map[string]string{"../x": "1"} },
		func(s *pb.Spec) { s.Linux.Resources.Memory.Limit = math.MinInt64 },
	} {
		spec := fullSpec()
		change(spec)
		data, err := proto.Marshal(spec)
		if err != nil {
			f.Fatal(err)
		}
		f.Add("a", data)
	}
	f.Add("../a", []byte{})
	f.Fuzz(func(t *testing.T, id string, data []byte) {
		var spec pb.Spec
		if proto.Unmarshal(data, &spec) != nil {
			return
		}
		err := Validate(id, &spec)
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("Validate: %v, want errdefs.ErrInvalidArgument", err)
		}
		if err == nil {
			checkAccepted(t, id, &spec)
		}
		for _, m := range spec.GetMounts() {
			mount.ParseOptions(m.GetOptions()).Flags()
		}
		cgroupSettings(spec.GetLinux().GetResources())
	})
}

// checkAccepted checks what a child relies on in a spec that Validate has accepted.
func checkAccepted(t *testing.T, id string, spec *pb.Spec) {
	t.Helper()
	if strings.ContainsAny(id, "/\x00") || id == "" || id[0] == '.' {
		t.Errorf("Validate accepted the container id %q", id)
	}
	if len(spec.Process.Args) == 0 {
		t.Errorf("Validate accepted a process without a program: %v", spec)
	}
	if spec.Process.User.GetUID() == math.MaxUint32 {
		t.Error("Validate accepted a user id that means root")
	}
	deviceProgram(deviceRules(spec.Linux))
	for _, m := range spec.Mounts {
		if m.Type == guestMountType && m.Source != "/msb-portal" {
			t.Errorf("Validate accepted a mount of the guest's file %q", m.Source)
		}
	}
}
