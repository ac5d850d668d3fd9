package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
)

// stockCmdline is the kernel command line that Kata's QEMU driver writes for a guest in debug mode with a serial console.
const stockCmdline = "tsc=reliable no_timer_check rcupdate.rcu_expedited=1 noreplace-smp reboot=k cryptomgr.notests net.ifnames=0 " +
	"pci=lastbus=0 console=ttyS0 debug panic=1 nr_cpus=2 selinux=0 systemd.unit=kata-containers.target " +
	"i8042.direct=1 i8042.dumbkbd=1 i8042.nopnp=1 i8042.noaux=1 " +
	"systemd.mask=systemd-networkd.service agent.log=debug agent.debug_console agent.debug_console_vport=1026 " +
	"mitigations=off random.trust_cpu=on loglevel=0"

// stock is a guest that the tests use as an unmodified Kata shim and its QEMU driver do.
type stock struct {
	*guest
	qmp *qmpClient
}

// mainID is the container that runs from the beginning to the end of the test.
const mainID = "main"

// TestStock boots a machine as unmodified Kata does, and plugs in the disks and network interfaces that its containers
// need.
func TestStock(t *testing.T) {
	monitor := filepath.Join(t.TempDir(), "qmp.sock")
	s := &stock{guest: bootGuest(t, stockArguments(monitor, stockCmdline)...)}
	s.qmp = dialQMP(t, monitor)
	ok(t)(s.CreateSandbox(t.Context(), &pb.CreateSandboxRequest{
		SandboxId: mainID, Hostname: "guest", Dns: []string{"nameserver 192.0.2.7", "options ndots:5", ""},
		Storages: []*pb.Storage{
			{Driver: "virtio-fs", Source: shareTag, Fstype: "virtiofs", MountPoint: shimShare, Options: []string{"ro"}},
			{Driver: "ephemeral", Source: "shm", Fstype: "tmpfs", MountPoint: "/run/kata-containers/sandbox/shm", Options: []string{
				"noexec", "nosuid", "nodev", "mode=1777", "size=67108864"}},
		},
	}))

	t.Run("container", s.testContainer)
	t.Run("root on a disk", s.testRootDisk)
	t.Run("volume", s.testVolume)
	t.Run("overlay", s.testOverlay)
	t.Run("portal", func(t *testing.T) {
		request := func(id string) *pb.CreateContainerRequest { return s.container(t, id) }
		testPortal(t, s.guest, request, s.execPortal)
	})
	t.Run("interfaces", s.testInterfaces)
	t.Run("clock and random numbers", s.testClock)
	t.Run("memory limit in a nested cgroup", s.testNestedOOM)
	t.Run("refused", s.testRefused)
	t.Run("console", s.testConsole)
	t.Run("end", s.testEnd)
}

// start creates and starts a container.
func (s *stock) start(t *testing.T, req *pb.CreateContainerRequest) {
	t.Helper()
	ok(t)(s.CreateContainer(t.Context(), req))
	ok(t)(s.StartContainer(t.Context(), &pb.StartContainerRequest{ContainerId: req.ContainerId}))
}

// stop kills and removes a container, as the shim does.
func (s *stock) stop(t *testing.T, id string) {
	t.Helper()
	ok(t)(s.SignalProcess(t.Context(), &pb.SignalProcessRequest{ContainerId: id, Signal: 9}))
	s.finish(t, id, id)
	ok(t)(s.RemoveContainer(t.Context(), &pb.RemoveContainerRequest{ContainerId: id}))
}

// container returns a request to create a container with the test tool, whose root is in the share. The share is mounted
// read-only.
func (s *stock) container(t *testing.T, id string) *pb.CreateContainerRequest {
	t.Helper()
	spec := buildRoot(t, s.guest, id)
	for _, dir := range []string{"proc", "dev", "sys", "srv", ".msb", "data"} {
		if err := os.MkdirAll(filepath.Join(s.share, id, "rootfs", dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(s.share, id, "rootfs/.msb/portal"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	spec.Process.Capabilities.Bounding = append(spec.Process.Capabilities.Bounding, "CAP_MKNOD", "CAP_DAC_OVERRIDE")
	return &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: spec}
}

// addMount adds a bind mount of a path in the guest to a container.
func addMount(req *pb.CreateContainerRequest, source, destination string, options ...string) {
	req.OCI.Mounts = append(req.OCI.Mounts, &pb.Mount{
		Destination: destination, Type: "bind", Source: source, Options: append([]string{"rbind"}, options...),
	})
}

// privileged returns a process that runs the test tool with the additional capabilities that these tests need.
func privileged(args ...string) *pb.Process {
	p := tool(args...)
	caps := append(p.Capabilities.Bounding, "CAP_MKNOD", "CAP_DAC_OVERRIDE", "CAP_NET_ADMIN")
	p.Capabilities = &pb.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	p.Cwd = "/"
	return p
}

// checkOutput runs the test tool in a container and compares its output with want.
func (s *stock) checkOutput(t *testing.T, id, want string, args ...string) {
	t.Helper()
	exec := strings.ReplaceAll(t.Name(), "/", "-") + "-" + time.Now().Format("150405.000000000")
	if r := s.run(t, id, exec, privileged(args...)); r.stdout != want {
		t.Errorf("tool %v: %v, want stdout %q", args, r, want)
	}
}

// testConsole checks the agent's log on the console.
func (s *stock) testConsole(t *testing.T) {
	log, err := os.ReadFile(s.console)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`level=INFO msg="kernel parameter ignored" parameter="agent.debug_console: not supported by this agent"`,
		"level=DEBUG msg=request method=CreateSandbox",
	} {
		if !strings.Contains(string(log), want) {
			t.Errorf("the console lacks the line %s", want)
		}
	}
	if strings.Contains(string(log), "panic") {
		t.Error("the console has the word panic")
	}
}

// testEnd presses Ctrl-Alt-Del while a container is running and using a disk. The machine must power off and the data must
// be on the disk.
func (s *stock) testEnd(t *testing.T) {
	disk := makeDisk(t, t.TempDir(), 8)
	const mountPoint = "/run/kata-containers/sandbox/storage/last"
	req := s.container(t, "last")
	req.Storages = []*pb.Storage{{Driver: "blk", Source: s.qmp.plugDisk(t, disk), Fstype: "ext4", MountPoint: mountPoint}}
	addMount(req, mountPoint, "/data")
	s.start(t, req)
	s.checkOutput(t, "last", "", "put", "/data/file", "written")
	s.qmp.do(t, "send-key", map[string]any{"keys": []map[string]any{
		{"type": "qcode", "data": "ctrl"}, {"type": "qcode", "data": "alt"}, {"type": "qcode", "data": "delete"},
	}})
	select {
	case <-s.exited:
	case <-time.After(bootLimit):
		t.Fatal("the guest did not power itself off after Ctrl-Alt-Del")
	}
	if got := diskFile(t, disk, "/file"); got != "written" {
		t.Errorf("the file on the disk has %q, want written", got)
	}
}
