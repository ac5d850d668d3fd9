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

// testContainer starts the main container, which runs until the end of the test. It signals execs in it and closes their
// input.
func (s *stock) testContainer(t *testing.T) {
	ctx := t.Context()
	first := s.container(t, mainID)
	first.OCI.Hostname = ""
	addMount(first, "/etc/resolv.conf", "/etc/resolv.conf", "ro")
	if err := os.WriteFile(filepath.Join(s.share, mainID, "rootfs/etc/resolv.conf"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s.start(t, first)
	s.checkOutput(t, mainID, `/etc/resolv.conf: "nameserver 192.0.2.7\noptions ndots:5\n" false`+"\n", "files", "/etc/resolv.conf")
	if r := s.run(t, mainID, "host", privileged("self")); !strings.Contains(r.stdout, " guest / ") {
		t.Errorf("self: %v, want the sandbox's host name guest", r)
	}

	// A signal reaches only the process that it is for.
	s.exec(t, mainID, "bystander", privileged("wait"))
	// The process prints a line after it has installed its signal handler.
	if _, err := s.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: mainID, ExecId: "bystander", Len: 100}); err != nil {
		t.Fatal(err)
	}
	s.exec(t, mainID, "ended", privileged("wait"))
	ok(t)(s.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: mainID, ExecId: "ended", Signal: 15}))
	if r := s.finish(t, mainID, "ended"); r.status != 128+15 {
		t.Errorf("exec after SIGTERM: %v, want status %d", r, 128+15)
	}
	ok(t)(s.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: mainID, ExecId: "bystander", Signal: 10}))
	if r := s.finish(t, mainID, "bystander"); r.status != 7 {
		t.Errorf("bystander after SIGUSR1: %v, want status 7", r)
	}

	// A write of no bytes closes the input.
	s.exec(t, mainID, "in", privileged("copy"))
	for _, part := range []string{"text", ""} {
		ok(t)(s.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: mainID, ExecId: "in", Data: []byte(part)}))
	}
	if r := s.finish(t, mainID, "in"); r != (result{"text", "", 0}) {
		t.Error(r)
	}

	// The kernel does not deliver SIGTERM to the first process of a pid namespace if the process does not handle it. The
	// agent must kill such a process.
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
		t.Errorf("main process after SIGTERM: %v, want status %d", r, 128+9)
	}
	ok(t)(s.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: "sleeper"}))
}

// testNestedOOM lets a program exceed the memory limit of a cgroup that the container has created below its own.
func (s *stock) testNestedOOM(t *testing.T) {
	ctx := t.Context()
	req := s.container(t, "nest")
	req.OCI.Process = privileged("nest")
	req.OCI.Mounts[6].Options = []string{"rw", "nosuid", "noexec", "nodev"} // make the container's cgroups writable
	s.start(t, req)
	// The process prints a line after it has created its cgroup.
	if _, err := s.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: "nest", ExecId: "nest", Len: 100}); err != nil {
		t.Fatal(err)
	}
	if r := s.run(t, "nest", "eat", privileged("nesteat", "40", "16")); r.status != 128+9 {
		t.Errorf("program over the memory limit: %v, want status %d", r, 128+9)
	}
	limited, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	if e, err := s.GetOOMEvent(limited, &pb.GetOOMEventRequest{}); e.GetContainerId() != "nest" {
		t.Errorf("OOM event: %v, %v; want one of container nest", e, err)
	}
	limited, cancel = context.WithTimeout(ctx, time.Second)
	defer cancel()
	if e, err := s.GetOOMEvent(limited, &pb.GetOOMEventRequest{}); err == nil {
		t.Errorf("second OOM event: %v, want none", e)
	}
	stats, err := s.StatsContainer(ctx, &pb.StatsContainerRequest{ContainerId: "nest"})
	if err != nil || stats.CgroupStats.PidsStats.Current < 1 {
		t.Errorf("statistics: %v, %v; want at least 1 process", stats, err)
	}
	s.stop(t, "nest") // removes the nested cgroups as well
}

// testRefused makes requests for features that this guest does not support. Each must fail with Unimplemented.
func (s *stock) testRefused(t *testing.T) {
	ctx := t.Context()
	_, err := s.CreateSandbox(ctx, &pb.CreateSandboxRequest{GuestHookPath: "/usr/share/oci/hooks"})
	wantCode(t, err, codes.Unimplemented)
	if err != nil && !strings.Contains(err.Error(), "guest_hook_path") {
		t.Errorf("request with hooks: %v, want an error that names guest_hook_path", err)
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
		"shared mounts":          func(r *pb.CreateContainerRequest) { r.SharedMounts = []*pb.SharedMount{{}} },
		"a shared pid namespace": func(r *pb.CreateContainerRequest) { r.SandboxPidns = true },
		"huge pages":             storage(&pb.Storage{Driver: "ephemeral", Source: "nodev", Fstype: "hugetlbfs"}),
		"a raw disk":             storage(&pb.Storage{Driver: "blk", Source: "01/01", Fstype: "bind"}),
		"files of a group":       storage(&pb.Storage{Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", FsGroup: &pb.FSGroup{GroupId: 7}}),
	} {
		req := s.container(t, "refused")
		change(req)
		_, err := s.CreateContainer(ctx, req)
		wantCode(t, err, codes.Unimplemented)
		if err == nil {
			t.Errorf("the agent accepted a container with %s", name)
		}
	}
	details, err := s.GetGuestDetails(ctx, &pb.GuestDetailsRequest{MemBlockSize: true, MemHotplugProbe: true})
	if err != nil {
		t.Fatal(err)
	}
	if details.SupportMemHotplugProbe || details.MemBlockSizeBytes != 0 || details.AgentDetails.SupportsSeccomp {
		t.Errorf("guest details: %v", details)
	}
}
