package agent

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"
)

// testContainer starts the container that stays, signals processes beside it, and ends their input.
func (s *stock) testContainer(t *testing.T) {
	ctx := t.Context()
	first := s.container(t, mainID)
	first.OCI.Hostname = ""
	mounted(first, "/etc/resolv.conf", "/etc/resolv.conf", "ro")
	if err := os.WriteFile(filepath.Join(s.share, mainID, "rootfs/etc/resolv.conf"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s.start(t, first)
	s.says(t, mainID, `/etc/resolv.conf: "nameserver 192.0.2.7\noptions ndots:5\n" false`+"\n", "files", "/etc/resolv.conf")
	if r := s.run(t, mainID, "host", privileged("self")); !strings.Contains(r.stdout, " guest / ") {
		t.Errorf("the host name is not the sandbox's: %v", r)
	}

	// A signal to one process reaches no other.
	s.exec(t, mainID, "bystander", privileged("wait"))
	if _, err := s.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: mainID, ExecId: "bystander", Len: 100}); err != nil {
		t.Fatal(err) // now it has its handler
	}
	s.exec(t, mainID, "ended", privileged("wait"))
	ok(t)(s.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: mainID, ExecId: "ended", Signal: 15}))
	if r := s.finish(t, mainID, "ended"); r.status != 128+15 {
		t.Errorf("after SIGTERM: %v", r)
	}
	ok(t)(s.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: mainID, ExecId: "bystander", Signal: 10}))
	if r := s.finish(t, mainID, "bystander"); r.status != 7 {
		t.Errorf("exec beside: %v", r)
	}

	// Input without bytes is the end of the input.
	s.exec(t, mainID, "in", privileged("copy"))
	for _, part := range []string{"text", ""} {
		ok(t)(s.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: mainID, ExecId: "in", Data: []byte(part)}))
	}
	if r := s.finish(t, mainID, "in"); r != (result{"text", "", 0}) {
		t.Error(r)
	}

	// A first process of a pid namespace without a handler for SIGTERM would not notice it.
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	sleeper := s.container(t, "sleeper")
	sleeper.OCI.Process.Args = []string{"/busybox", "sleep", "1000"}
	if err := os.WriteFile(filepath.Join(s.share, "sleeper/rootfs/busybox"), data, 0o755); err != nil {
		t.Fatal(err)
	}
	s.start(t, sleeper)
	ok(t)(s.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: "sleeper", Signal: 15}))
	if r := s.finish(t, "sleeper", "sleeper"); r.status != 128+9 {
		t.Errorf("after SIGTERM: %v", r)
	}
	ok(t)(s.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: "sleeper"}))
}

// testNestedOOM lets a program in a group that the container made itself eat too much.
func (s *stock) testNestedOOM(t *testing.T) {
	ctx := t.Context()
	req := s.container(t, "nest")
	req.OCI.Process = privileged("nest")
	req.OCI.Mounts[6].Options = []string{"rw", "nosuid", "noexec", "nodev"} // its groups are its own
	s.start(t, req)
	if _, err := s.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: "nest", ExecId: "nest", Len: 100}); err != nil {
		t.Fatal(err) // now it has made its group
	}
	if r := s.run(t, "nest", "eat", privileged("nesteat", "40", "16")); r.status != 128+9 {
		t.Errorf("a program over the limit: %v", r)
	}
	limited, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	if e, err := s.GetOOMEvent(limited, &pb.GetOOMEventRequest{}); e.GetContainerId() != "nest" {
		t.Errorf("event %v, %v", e, err)
	}
	limited, cancel = context.WithTimeout(ctx, time.Second)
	defer cancel()
	if e, err := s.GetOOMEvent(limited, &pb.GetOOMEventRequest{}); err == nil {
		t.Errorf("another event: %v", e)
	}
	stats, err := s.StatsContainer(ctx, &pb.StatsContainerRequest{ContainerId: "nest"})
	if err != nil || stats.CgroupStats.PidsStats.Current < 1 {
		t.Errorf("statistics %v, %v", stats, err)
	}
	s.stop(t, "nest") // with all of its groups
}

// testRefused asks for what this guest does not do. The answer says so, and nothing is left half done.
func (s *stock) testRefused(t *testing.T) {
	ctx := t.Context()
	_, err := s.CreateSandbox(ctx, &pb.CreateSandboxRequest{GuestHookPath: "/usr/share/oci/hooks"})
	wantCode(t, err, codes.Unimplemented)
	if err != nil && !strings.Contains(err.Error(), "guest_hook_path") {
		t.Errorf("hooks: %v", err)
	}
	_, err = s.CreateSandbox(ctx, &pb.CreateSandboxRequest{KernelModules: []*pb.KernelModule{{Name: "nosuch"}}})
	wantCode(t, err, codes.Unimplemented)
	_, err = s.SetPolicy(ctx, &pb.SetPolicyRequest{Policy: "package agent_policy"})
	wantCode(t, err, codes.Unimplemented)
	storage := func(st *pb.Storage) func(*pb.CreateContainerRequest) {
		st.MountPoint = "/run/kata-containers/refused"
		return func(r *pb.CreateContainerRequest) { r.Storages = []*pb.Storage{st} }
	}
	for name, change := range map[string]func(*pb.CreateContainerRequest){
		"a device": func(r *pb.CreateContainerRequest) {
			r.Devices = []*pb.Device{{Type: "vfio-pci-gk", ContainerPath: "/dev/vfio/1"}}
		},
		"shared mounts":      func(r *pb.CreateContainerRequest) { r.SharedMounts = []*pb.SharedMount{{}} },
		"shared process ids": func(r *pb.CreateContainerRequest) { r.SandboxPidns = true },
		"huge pages":         storage(&pb.Storage{Driver: "ephemeral", Source: "nodev", Fstype: "hugetlbfs"}),
		"a raw disk":         storage(&pb.Storage{Driver: "blk", Source: "01/01", Fstype: "bind"}),
		"files of a group":   storage(&pb.Storage{Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", FsGroup: &pb.FSGroup{GroupId: 7}}),
	} {
		req := s.container(t, "refused")
		change(req)
		_, err := s.CreateContainer(ctx, req)
		wantCode(t, err, codes.Unimplemented)
		if err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	details, err := s.GetGuestDetails(ctx, &pb.GuestDetailsRequest{MemBlockSize: true, MemHotplugProbe: true})
	if err != nil {
		t.Fatal(err)
	}
	if details.SupportMemHotplugProbe || details.MemBlockSizeBytes != 0 || details.AgentDetails.SupportsSeccomp {
		t.Errorf("details %v", details)
	}
}
