package agent

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	testMAC  = "52:54:00:12:34:56"
	diskSlot = "0a"
)

// TestGuest boots a microVM and takes a container through its lifecycle with the requests that the shim makes.
func TestGuest(t *testing.T) {
	content := t.TempDir()
	if err := os.WriteFile(filepath.Join(content, "file"), []byte("on the disk"), 0o644); err != nil {
		t.Fatal(err)
	}
	disk := makeDisk(t, content, 8)
	image, upper := makeRootDisks(t)
	control, portal := filepath.Join(t.TempDir(), "control.sock"), freeAddress(t)
	g := bootGuest(t, "-drive", "if=none,id=disk,format=raw,readonly=on,file="+disk,
		"-device", "virtio-blk-pci,drive=disk,addr="+diskSlot,
		"-drive", "if=none,id=upper,format=raw,discard=unmap,cache=unsafe,file="+upper, "-device", "virtio-blk-pci,drive=upper,serial=msb-upper",
		"-drive", "if=none,id=image,format=raw,readonly=on,file="+image, "-device", "virtio-blk-pci,drive=image,serial=msb-image",
		"-chardev", "socket,id=control,server=on,wait=off,path="+control, "-device", "virtserialport,chardev=control,name=msb.ctl",
		// The network interface over which msbd reaches the portal. The host has the address 10.0.2.2.
		"-netdev", "user,id=portal,restrict=on,hostfwd=tcp:"+portal+"-10.0.2.15:4600",
		"-device", "virtio-net-pci,netdev=portal,mac=02:00:00:00:00:01")
	g.control, g.portal = control, portal
	t.Logf("booted in %v", g.bootTime)
	ctx := t.Context()
	const id = "box1"
	ok(t)(g.CreateSandbox(ctx, &pb.CreateSandboxRequest{SandboxId: id, Hostname: "guest", Storages: []*pb.Storage{{
		Driver: "ephemeral", Source: "shm", Fstype: "tmpfs", MountPoint: "/run/kata-containers/sandbox/shm",
		Options: []string{"noexec", "nosuid", "nodev", "mode=1777", "size=67108864"},
	}}}))
	spec := buildRoot(t, g, id)
	ok(t)(g.CopyFile(ctx, &pb.CopyFileRequest{
		Path: shimShare + "/" + id + "-1234-resolv.conf", FileSize: 22, FileMode: unix.S_IFREG | 0o644,
		Data: []byte("nameserver "),
	}))
	ok(t)(g.CopyFile(ctx, &pb.CopyFileRequest{
		Path: shimShare + "/" + id + "-1234-resolv.conf", FileSize: 22, FileMode: unix.S_IFREG | 0o644,
		Data: []byte("192.0.2.53\n"), Offset: 11,
	}))
	spec.Mounts = append(spec.Mounts, &pb.Mount{
		Destination: "/etc/resolv.conf", Type: "bind", Source: shimShare + "/" + id + "-1234-resolv.conf", Options: []string{"rbind", "ro"},
	})
	ok(t)(g.CreateContainer(ctx, &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: spec}))

	t.Run("network", func(t *testing.T) { testNetwork(t, g) })
	t.Run("exec before start", func(t *testing.T) {
		_, err := g.ExecProcess(ctx, &pb.ExecProcessRequest{ContainerId: id, ExecId: "early", Process: tool("self")})
		wantCode(t, err, codes.FailedPrecondition)
	})
	ok(t)(g.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: id}))

	t.Run("clock", func(t *testing.T) { testClock(t, g, id) })
	t.Run("wrong clock", func(t *testing.T) { testWrongClock(t, g, id) })
	t.Run("environment", func(t *testing.T) { testEnvironment(t, g, id) })
	t.Run("streams", func(t *testing.T) { testStreams(t, g, id) })
	t.Run("terminal", func(t *testing.T) { testTerminal(t, g, id) })
	t.Run("signals", func(t *testing.T) { testSignals(t, g, id) })
	t.Run("start errors", func(t *testing.T) { testStartErrors(t, g, id) })
	t.Run("stats", func(t *testing.T) { testStats(t, g, id) })
	t.Run("machine", func(t *testing.T) { testMachine(t, g) })
	t.Run("reconnect", func(t *testing.T) { testReconnect(t, g, id) })
	t.Run("memory limit", func(t *testing.T) { testOOM(t, g, id) })
	t.Run("end of the container", func(t *testing.T) { testEnd(t, g, id) })
	t.Run("restricted container", func(t *testing.T) { testRestricted(t, g) })
	t.Run("template", func(t *testing.T) { testTemplate(t, g) })
	t.Run("portal", func(t *testing.T) {
		request := func(id string) *pb.CreateContainerRequest {
			return &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: buildRoot(t, g, id)}
		}
		token := g.personalize(t)
		testPortal(t, g, request, func(t *testing.T, _ string, _ uint32) net.Conn { return g.dialPortal(t, token) })
	})
	t.Run("root on disks", func(t *testing.T) { testDiskRoot(t, g, upper) })

	ok(t)(g.DestroySandbox(ctx, &pb.DestroySandboxRequest{}))
	select {
	case <-g.exited:
	case <-time.After(bootLimit):
		t.Fatal("the guest did not power itself off after DestroySandbox")
	}
	checkUpper(t, upper)
}

func testEnvironment(t *testing.T, g *guest, id string) {
	r := g.run(t, id, "self", tool("self"))
	var pid int
	var rest string
	if _, err := fmt.Sscanf(r.stdout, "%d", &pid); err != nil || pid < 2 || pid > 1000 {
		t.Errorf("self: %v, want a pid from 2 to 1000", r)
	}
	_, rest, _ = strings.Cut(strings.TrimSpace(r.stdout), " ")
	if want := "0 0 [] box /srv /root y 2048"; rest != want {
		t.Errorf("self printed %q, want %q", rest, want)
	}

	p := tool("self")
	p.User = &pb.User{UID: 1000, GID: 1001, AdditionalGids: []uint32{7, 8}}
	p.Cwd, p.Env = "/made/here", []string{"X=z"}
	r = g.run(t, id, "user", p)
	_, rest, _ = strings.Cut(strings.TrimSpace(r.stdout), " ")
	if want := "1000 1001 [7 8] box /made/here /home/user z 2048"; rest != want {
		t.Errorf("self as another user printed %q, want %q", rest, want)
	}

	p = tool("status", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")
	p.User = &pb.User{UID: 1000, GID: 1000}
	p.Capabilities.Effective = []string{"CAP_KILL"}
	p.Capabilities.Permitted = []string{"CAP_KILL"}
	p.Capabilities.Inheritable = []string{"CAP_KILL"}
	p.Capabilities.Ambient = []string{"CAP_KILL"}
	want := "CapInh: 0000000000000020\nCapPrm: 0000000000000020\nCapEff: 0000000000000020\n" +
		"CapBnd: 0000000000000421\nCapAmb: 0000000000000020\nNoNewPrivs: 1\n"
	if r = g.run(t, id, "caps", p); r.stdout != want {
		t.Errorf("capabilities: %v, want stdout %q", r, want)
	}

	r = g.run(t, id, "files", tool("files", "/etc/resolv.conf", "/proc/sys/net/ipv4/ip_unprivileged_port_start",
		"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max", "/proc/1/cmdline", "/proc/keys"))
	want = `/etc/resolv.conf: "nameserver 192.0.2.53\n" false` + "\n" +
		`/proc/sys/net/ipv4/ip_unprivileged_port_start: "80\n" false` + "\n" +
		`/sys/fs/cgroup/memory.max: "100663296\n" false` + "\n" +
		`/sys/fs/cgroup/cpu.max: "150000 100000\n" false` + "\n" +
		`/proc/1/cmdline: "/tool\x00wait\x00" false` + "\n" +
		`/proc/keys: "" false` + "\n"
	if r.stdout != want {
		t.Errorf("files: %v, want stdout %q", r, want)
	}

	r = g.run(t, id, "write", tool("write", "/srv/file", "/dev/shm/file", "/.msb/portal", "/etc/resolv.conf",
		"/proc/sys/kernel/hostname", "/sys/fs/cgroup/memory.max"))
	want = "/srv/file: true\n/dev/shm/file: true\n/.msb/portal: false\n/etc/resolv.conf: false\n" +
		"/proc/sys/kernel/hostname: false\n/sys/fs/cgroup/memory.max: false\n"
	if r.stdout != want {
		t.Errorf("writable files: %v, want stdout %q", r, want)
	}
	if _, err := os.Stat(filepath.Join(g.share, id, "rootfs/srv/file")); err != nil {
		t.Errorf("a file written in the container is not on the host: %v", err)
	}

	r = g.run(t, id, "list", tool("list", "/dev", "/", "/sys/firmware"))
	lines := strings.Split(r.stdout, "\n")
	if want := "/dev/fd /dev/full /dev/mqueue /dev/null /dev/ptmx /dev/pts /dev/random /dev/shm /dev/stderr /dev/stdin /dev/stdout /dev/tty /dev/urandom /dev/zero"; lines[0] != want {
		t.Errorf("/dev has %q, want %q", lines[0], want)
	}
	if strings.Contains(lines[1], "newroot") || lines[2] != "" {
		t.Errorf("the container sees the guest's root or a masked directory: %v", r)
	}

	// The container can run the portal, which is mounted from the guest.
	p = tool()
	p.Args = []string{"/.msb/portal", "--help"}
	if r := g.run(t, id, "portal", p); r.stdout+r.stderr == "" {
		t.Errorf("portal printed nothing: %v", r)
	}
}

func testStreams(t *testing.T, g *guest, id string) {
	ctx := t.Context()
	if r := g.run(t, id, "s1", tool("streams", "out", "err", "3")); r != (result{"out", "err", 3}) {
		t.Error(r)
	}
	const size = 3<<20 + 17
	if r := g.run(t, id, "s2", tool("print", fmt.Sprint(size))); len(r.stdout) != size || r.status != 0 {
		t.Errorf("printed %d bytes with status %d, want %d with status 0", len(r.stdout), r.status, size)
	}

	// An input that is larger than the pipe arrives completely, and so does its end.
	g.exec(t, id, "s3", tool("copy"))
	input := strings.Repeat("0123456789abcdef", 20_000)
	go func() {
		for part := range slices.Chunk([]byte(input), 32<<10) {
			if _, err := g.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: id, ExecId: "s3", Data: part}); err != nil {
				t.Error(err)
			}
		}
		if _, err := g.CloseStdin(ctx, &pb.CloseStdinRequest{ContainerId: id, ExecId: "s3"}); err != nil {
			t.Error(err)
		}
	}()
	if r := g.finish(t, id, "s3"); r != (result{input, "", 0}) {
		t.Errorf("copied %d bytes with status %d, want %d with status 0", len(r.stdout), r.status, len(input))
	}
	_, err := g.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: id, ExecId: "s3", Data: []byte("x")})
	wantCode(t, err, codes.FailedPrecondition)

	// A short read leaves the rest for the next one.
	g.exec(t, id, "s4", tool("streams", "abcdef", "", "0"))
	got := ""
	for range 3 {
		resp, err := g.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: id, ExecId: "s4", Len: 2})
		if err != nil {
			t.Fatal(err)
		}
		got += string(resp.Data)
	}
	if got != "abcdef" {
		t.Errorf("three short reads returned %q, want abcdef", got)
	}
	_, err = g.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: id, ExecId: "s4", Len: 2})
	wantCode(t, err, codes.OutOfRange)

	// A child left in the background does not keep the exec's streams open.
	if r := g.run(t, id, "s5", tool("orphan")); !strings.HasPrefix(r.stdout, "parent ends\n") || r.status != 0 {
		t.Error(r)
	}
}

func testTerminal(t *testing.T, g *guest, id string) {
	ctx := t.Context()
	p := tool("tty")
	p.Terminal, p.ConsoleSize = true, &pb.Box{Height: 30, Width: 100}
	g.exec(t, id, "t1", p)
	read := func(until string) string {
		t.Helper()
		var b strings.Builder
		for !strings.Contains(b.String(), until) {
			resp, err := g.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: id, ExecId: "t1", Len: 1000})
			if err != nil {
				t.Fatalf("terminal printed %q, want %q: %v", b.String(), until, err)
			}
			b.Write(resp.Data)
		}
		return b.String()
	}
	read("size 30x100")
	ok(t)(g.TtyWinResize(ctx, &pb.TtyWinResizeRequest{ContainerId: id, ExecId: "t1", Row: 40, Column: 120}))
	ok(t)(g.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: id, ExecId: "t1", Data: []byte("hello\n")}))
	read("size 40x120")
	if r := g.finish(t, id, "t1"); r.status != 0 || r.stderr != "" {
		t.Error(r)
	}
	_, err := g.TtyWinResize(ctx, &pb.TtyWinResizeRequest{ContainerId: id, ExecId: "t1", Row: 40, Column: 120})
	wantCode(t, err, codes.FailedPrecondition)
}

func testSignals(t *testing.T, g *guest, id string) {
	ctx := t.Context()
	g.exec(t, id, "k1", tool("wait"))
	// The process prints a line after it has installed its signal handler.
	if _, err := g.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: id, ExecId: "k1", Len: 100}); err != nil {
		t.Fatal(err)
	}
	ok(t)(g.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: id, ExecId: "k1", Signal: uint32(unix.SIGUSR1)}))
	if r := g.finish(t, id, "k1"); r.status != 7 {
		t.Error(r)
	}
	g.exec(t, id, "k2", tool("wait"))
	ok(t)(g.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: id, ExecId: "k2", Signal: uint32(unix.SIGKILL)}))
	if r := g.finish(t, id, "k2"); r.status != 128+9 {
		t.Error(r)
	}
	// A signal to a process that has exited is not an error, and the process keeps its status.
	ok(t)(g.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: id, ExecId: "k2", Signal: uint32(unix.SIGKILL)}))
	resp, err := g.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: id, ExecId: "k2"})
	if err != nil || resp.Status != 128+9 {
		t.Errorf("second wait: %v, %v; want status %d", resp, err, 128+9)
	}
}

func testStartErrors(t *testing.T, g *guest, id string) {
	for name, change := range map[string]func(*pb.Process){
		"nosuch: executable file not found": func(p *pb.Process) { p.Args[0] = "nosuch" },
		"no such file or directory":         func(p *pb.Process) { p.Args[0] = "/nosuch" },
		"permission denied":                 func(p *pb.Process) { p.Args[0] = "/etc/passwd" },
		"not a directory":                   func(p *pb.Process) { p.Cwd = "/etc/passwd/below" },
	} {
		p := tool("self")
		change(p)
		_, err := g.ExecProcess(t.Context(), &pb.ExecProcessRequest{ContainerId: id, ExecId: "bad", Process: p})
		wantCode(t, err, codes.FailedPrecondition)
		if _, detail, _ := strings.Cut(name, ": "); err != nil && !strings.Contains(err.Error(), detail) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A failed exec does not use up its id.
	if r := g.run(t, id, "bad", tool("streams", "fine", "", "0")); r.stdout != "fine" {
		t.Error(r)
	}
}

func testStats(t *testing.T, g *guest, id string) {
	resp, err := g.StatsContainer(t.Context(), &pb.StatsContainerRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	cpu, memory, pids := resp.CgroupStats.CpuStats.CpuUsage, resp.CgroupStats.MemoryStats, resp.CgroupStats.PidsStats
	if cpu.TotalUsage < 1e6 || cpu.TotalUsage > 300e9 {
		t.Errorf("CPU time is %d ns, want 1 ms to 300 s", cpu.TotalUsage)
	}
	if memory.Usage.Usage < 100<<10 || memory.Usage.Limit != 96<<20 || memory.Stats["anon"] == 0 {
		t.Errorf("memory statistics are %v", memory)
	}
	if pids.Current < 1 || pids.Current > 100 {
		t.Errorf("number of processes is %d, want 1 to 100", pids.Current)
	}
	if i := slices.IndexFunc(resp.NetworkStats, func(n *pb.NetworkStats) bool { return n.Name == "eth0" }); i < 0 {
		t.Errorf("network statistics lack eth0: %v", resp.NetworkStats)
	}

	ok(t)(g.UpdateContainer(t.Context(), &pb.UpdateContainerRequest{ContainerId: id, Resources: &pb.LinuxResources{
		CPU: &pb.LinuxCPU{Shares: 512}, Pids: &pb.LinuxPids{Limit: 200},
	}}))
	r := g.run(t, id, "limits", tool("files", "/sys/fs/cgroup/cpu.weight", "/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/memory.max"))
	if want := "/sys/fs/cgroup/cpu.weight: \"20\\n\" false\n/sys/fs/cgroup/pids.max: \"200\\n\" false\n/sys/fs/cgroup/memory.max: \"100663296\\n\" false\n"; r.stdout != want {
		t.Errorf("limits after UpdateContainer: %v, want stdout %q", r, want)
	}

	// A container that was paused and resumed can run processes.
	ok(t)(g.PauseContainer(t.Context(), &pb.PauseContainerRequest{ContainerId: id}))
	ok(t)(g.ResumeContainer(t.Context(), &pb.ResumeContainerRequest{ContainerId: id}))
	if r := g.run(t, id, "resumed", tool("streams", "on", "", "0")); r.stdout != "on" {
		t.Error(r)
	}
}

func testMachine(t *testing.T, g *guest) {
	ctx := t.Context()
	details, err := g.GetGuestDetails(ctx, &pb.GuestDetailsRequest{MemBlockSize: true})
	if err != nil || details.AgentDetails.SupportsSeccomp {
		t.Errorf("guest details: %v, %v", details, err)
	}
	ok(t)(g.ReseedRandomDev(ctx, &pb.ReseedRandomDevRequest{Data: []byte(strings.Repeat("seed", 128))}))
	ok(t)(g.RemoveStaleVirtiofsShareMounts(ctx, &pb.RemoveStaleVirtiofsShareMountsRequest{}))
	metrics, err := g.GetMetrics(ctx, &pb.GetMetricsRequest{})
	if err != nil || !strings.Contains(metrics.Metrics, "kata_guest_meminfo{item=\"mem_total\"} 2") {
		t.Errorf("metrics: %v, %v", metrics, err)
	}
}

// testReconnect closes the connection while a request is in progress, and connects again.
func testReconnect(t *testing.T, g *guest, id string) {
	g.exec(t, id, "r1", tool("copy"))
	waiting := make(chan error)
	wait := g.WaitProcess
	go func() {
		_, err := wait(t.Context(), &pb.WaitProcessRequest{ContainerId: id, ExecId: "r1"})
		waiting <- err
	}()
	g.hangUp()
	if err := <-waiting; err == nil {
		t.Error("the request in progress succeeded although its connection was closed")
	}
	g.dial()
	ctx := t.Context()
	ok(t)(g.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: id, ExecId: "r1", Data: []byte("still here")}))
	ok(t)(g.CloseStdin(ctx, &pb.CloseStdinRequest{ContainerId: id, ExecId: "r1"}))
	if r := g.finish(t, id, "r1"); r != (result{"still here", "", 0}) {
		t.Error(r)
	}
}

func testOOM(t *testing.T, g *guest, id string) {
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	if r := g.run(t, id, "eat", tool("eat", "110")); r.status != 128+9 {
		t.Errorf("program over the memory limit: %v, want status %d", r, 128+9)
	}
	if e, err := g.GetOOMEvent(ctx, &pb.GetOOMEventRequest{}); e.GetContainerId() != id {
		t.Errorf("OOM event: %v, %v; want one of container %s", e, err, id)
	}
}

func testEnd(t *testing.T, g *guest, id string) {
	ctx := t.Context()
	g.exec(t, id, "last", tool("wait"))
	ok(t)(g.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: id, Signal: uint32(unix.SIGKILL)}))
	for range 2 { // the shim waits twice
		if r := g.finish(t, id, id); r.status != 128+9 {
			t.Errorf("main process: %v, want status %d", r, 128+9)
		}
	}
	if r := g.finish(t, id, "last"); r.status != 128+9 {
		t.Errorf("exec of a killed container: %v, want status %d", r, 128+9)
	}
	_, err := g.ExecProcess(ctx, &pb.ExecProcessRequest{ContainerId: id, ExecId: "after", Process: tool("self")})
	wantCode(t, err, codes.FailedPrecondition)
	ok(t)(g.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: id}))
	_, err = g.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: id, ExecId: id})
	wantCode(t, err, codes.NotFound)
	ok(t)(g.RemoveStaleVirtiofsShareMounts(ctx, &pb.RemoveStaleVirtiofsShareMountsRequest{}))
}

// testRestricted runs a second container in the same guest. It has a read-only root, a terminal and its own storages, and
// is removed while it is running.
func testRestricted(t *testing.T, g *guest) {
	ctx := t.Context()
	const id = "box2"
	spec := buildRoot(t, g, id)
	// The agent can still create the mount point of the portal: it makes the root read-only afterwards.
	spec.Root.Readonly = true
	spec.Process = tool("tty")
	spec.Process.Terminal, spec.Process.ConsoleSize = true, &pb.Box{Height: 24, Width: 80}
	spec.Process.Cwd = "/"
	storages := []*pb.Storage{
		{Driver: "ephemeral", Source: "tmpfs", Fstype: "tmpfs", MountPoint: "/run/kata-containers/sandbox/ephemeral/e"},
		{Driver: "blk", Source: diskSlot, Fstype: "ext4", MountPoint: "/run/kata-containers/sandbox/storage/disk"},
	}
	spec.Mounts = append(spec.Mounts,
		&pb.Mount{Destination: "/memory", Type: "bind", Source: storages[0].MountPoint, Options: []string{"bind"}},
		&pb.Mount{Destination: "/disk", Type: "bind", Source: storages[1].MountPoint, Options: []string{"bind", "ro"}},
		&pb.Mount{Destination: "/readonly", Type: "bind", Source: storages[0].MountPoint, Options: []string{"bind", "ro"}},
	)
	spec.Linux.Devices = []*pb.LinuxDevice{{Path: "/dev/mynull", Type: "c", Major: 1, Minor: 3, FileMode: 0o666}}
	ok(t)(g.CreateContainer(ctx, &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: spec, Storages: storages}))
	_, err := g.CreateContainer(ctx, &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: spec})
	wantCode(t, err, codes.AlreadyExists)
	ok(t)(g.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: id}))
	_, err = g.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: id})
	wantCode(t, err, codes.FailedPrecondition)
	p := tool("write", "/file", "/memory/file", "/readonly/file", "/disk/file", "/dev/mynull", "/dev/console")
	p.Cwd = "/"
	r := g.run(t, id, "w", p)
	if want := "/file: false\n/memory/file: true\n/readonly/file: false\n/disk/file: false\n/dev/mynull: true\n/dev/console: true\n"; r.stdout != want {
		t.Errorf("writable files: %v, want stdout %q", r, want)
	}
	p = tool("files", "/disk/file")
	p.Cwd = "/"
	if r := g.run(t, id, "d", p); r.stdout != "/disk/file: \"on the disk\" false\n" {
		t.Errorf("file on the disk: %v", r)
	}
	ok(t)(g.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: id}))

	// The id of a removed container can be used again, and a container that was never started can be removed.
	ok(t)(g.CreateContainer(ctx, &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: buildRoot(t, g, id)}))
	ok(t)(g.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: id}))
}

// ok returns a function that fails the test if a request returned an error. It takes the request's results.
func ok(t *testing.T) func(resp any, err error) {
	t.Helper()
	return func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
}

// wantCode reports a test error unless err has the given status code.
func wantCode(t *testing.T, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("status code %v (%v), want %v", got, err, want)
	}
}
