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

// testPod runs two containers that share what a pod's containers do.
func (s *stock) testPod(t *testing.T) {
	ctx := t.Context()
	infra := s.container(t, "pod")
	infra.OCI.Hostname, infra.SandboxPidns = "", true // the first one has no other to join
	mounted(infra, "/etc/resolv.conf", "/etc/resolv.conf", "ro")
	if err := os.WriteFile(filepath.Join(s.share, "pod/rootfs/etc/resolv.conf"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s.start(t, infra)
	s.says(t, "pod", `/etc/resolv.conf: "nameserver 192.0.2.7\noptions ndots:5\n" false`+"\n", "files", "/etc/resolv.conf")

	// A file and a directory of the share that a container may watch.
	shared := filepath.Join(s.share, "side-0001-config")
	if err := os.Mkdir(shared, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(shared, "key"), []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	side := s.container(t, "side")
	side.SandboxPidns, side.OCI.Hostname = true, ""
	side.OCI.Process.Args = []string{"/busybox", "sleep", "1000"} // no handler of its own for any signal
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"pod", "side"} {
		if err := os.WriteFile(filepath.Join(s.share, id, "rootfs/busybox"), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const watched = shimShare + "/watchable/side-0001-config"
	side.Storages = []*pb.Storage{{
		Driver: "watchable-bind", Source: shimShare + "/side-0001-config", Fstype: "bind", MountPoint: watched,
		Options: []string{"rbind", "rprivate", "ro"},
	}}
	mounted(side, watched, "/data", "ro")
	s.start(t, side)
	s.says(t, "side", `/proc/1/cmdline: "/tool\x00wait\x00" false`+"\n", "files", "/proc/1/cmdline")
	r := s.run(t, "side", "host", privileged("self"))
	if !strings.Contains(r.stdout, " pod / ") {
		t.Errorf("the host name is not the pod's: %v", r)
	}
	s.says(t, "side", "/data/key: \"old\" false\n", "files", "/data/key")
	// The host exchanges the file, as a ConfigMap changes.
	if err := os.WriteFile(filepath.Join(shared, "new"), []byte("new"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.says(t, "side", "/data/new: \"new\" false\n", "files", "/data/new")

	// A signal to the container is for its main process; nobody has to ignore SIGTERM.
	s.exec(t, "pod", "bystander", privileged("wait"))
	if _, err := s.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: "pod", ExecId: "bystander", Len: 100}); err != nil {
		t.Fatal(err) // now it has its handler
	}
	ok(t)(s.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: "side", Signal: 15}))
	if r := s.finish(t, "side", "side"); r.status != 128+9 && r.status != 128+15 {
		t.Errorf("after SIGTERM: %v", r)
	}
	ok(t)(s.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: "side"}))
	ok(t)(s.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: "pod", ExecId: "bystander", Signal: 10}))
	if r := s.finish(t, "pod", "bystander"); r.status != 7 {
		t.Errorf("exec beside: %v", r)
	}

	// Input without bytes is the end of the input.
	s.exec(t, "pod", "in", privileged("copy"))
	for _, part := range []string{"text", ""} {
		ok(t)(s.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: "pod", ExecId: "in", Data: []byte(part)}))
	}
	if r := s.finish(t, "pod", "in"); r != (result{"text", "", 0}) {
		t.Error(r)
	}

	// As the first process of a pid namespace, this one would not notice SIGTERM.
	alone := s.container(t, "side")
	alone.OCI.Process.Args = []string{"/busybox", "sleep", "1000"}
	s.start(t, alone)
	ok(t)(s.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: "side", Signal: 15}))
	if r := s.finish(t, "side", "side"); r.status != 128+9 {
		t.Errorf("after SIGTERM: %v", r)
	}
	ok(t)(s.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: "side"}))
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
	wantCode(t, err, codes.NotFound)
	_, err = s.SetPolicy(ctx, &pb.SetPolicyRequest{Policy: "package agent_policy"})
	wantCode(t, err, codes.Unimplemented)
	for name, change := range map[string]func(*pb.CreateContainerRequest){
		"vfio": func(r *pb.CreateContainerRequest) {
			r.Devices = []*pb.Device{{Type: "vfio-pci-gk", ContainerPath: "/dev/vfio/1"}}
		},
		"shared": func(r *pb.CreateContainerRequest) { r.SharedMounts = []*pb.SharedMount{{}} },
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
	if details.SupportMemHotplugProbe || details.MemBlockSizeBytes != 128<<20 || details.AgentDetails.SupportsSeccomp {
		t.Errorf("details %v", details)
	}
	_, err = s.MemHotplugByProbe(ctx, &pb.MemHotplugByProbeRequest{MemHotplugProbeAddr: []uint64{1 << 32}})
	wantCode(t, err, codes.Unimplemented)
}
