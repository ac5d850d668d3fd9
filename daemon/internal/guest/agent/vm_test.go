package agent

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"

	"github.com/msbd/msbd/daemon/internal/sys/tsc"
)

// bootLimit bounds the wait for a guest. It is long because an emulated guest on a busy machine has taken 30 s to boot.
const bootLimit = 90 * time.Second

const (
	// shareTag is the tag of the virtiofs device with the containers' roots. shimShare is where the shim expects it to be
	// mounted.
	shareTag, shimShare = "kataShared", "/run/kata-containers/shared/containers"
	// createDirectory is the prefix of the option with which the shim names a directory for an overlay.
	createDirectory = "io.katacontainers.volume.overlayfs.create_directory="
)

// guest is a booted microVM with a client of its agent.
type guest struct {
	pb.AgentServiceService
	health pb.HealthService
	client *ttrpc.Client
	// options are the options of the clients that dial creates.
	options []ttrpc.ClientOpts
	// hangUp closes the connection. dial opens a new one and waits for the agent's response.
	hangUp func()
	dial   func()
	// socket is the path of the agent's socket. console is the path of the file with the output on the guest's console.
	socket, console string
	// share is the host directory that is the shim's share in the guest.
	share string
	// control is the path of the control port's socket. It is empty if the guest has no control port.
	control string
	// portal is the address on this machine that leads to the guest's port for the portal.
	portal string
	// bootTime is the time from the start of QEMU to the agent's first response.
	bootTime time.Duration
	exited   chan struct{}
}

// bootGuest starts virtiofsd and QEMU with the built guest image, and waits for the agent.
func bootGuest(t *testing.T, extra ...string) *guest {
	t.Helper()
	image := filepath.Join(moduleRoot(t), "bin", "guest")
	for _, f := range []string{"vmlinux", "initrd.img"} {
		if _, err := os.Stat(filepath.Join(image, f)); err != nil {
			t.Fatalf("%v: run 'make guest' first", err)
		}
	}
	dir := t.TempDir()
	g := &guest{share: filepath.Join(dir, "share"), exited: make(chan struct{})}
	if err := os.Mkdir(g.share, 0o755); err != nil {
		t.Fatal(err)
	}
	fsSocket := filepath.Join(dir, "fs.sock")
	startProcess(t, "virtiofsd", exec.Command("/usr/lib/qemu/virtiofsd", "--socket-path="+fsSocket,
		"-o", "source="+g.share, "-o", "cache=always", "-o", "sandbox=namespace", "-o", "announce_submounts"), nil)
	waitFor(t, "virtiofsd's socket", func() error {
		_, err := os.Stat(fsSocket)
		return err
	})

	g.socket, g.console = filepath.Join(dir, "agent.sock"), filepath.Join(dir, "console.log")
	started := time.Now()
	startProcess(t, "qemu", exec.Command("qemu-system-x86_64", slices.Concat([]string{
		"-M", "q35,memory-backend=mem", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-cpu", "max", "-m", "256",
		"-object", "memory-backend-memfd,id=mem,size=256M,share=on",
		"-kernel", filepath.Join(image, "vmlinux"), "-initrd", filepath.Join(image, "initrd.img"),
		"-append", "quiet loglevel=0 panic=-1 reboot=t cryptomgr.notests no_timer_check pci=lastbus=0 random.trust_cpu=on mitigations=off console=ttyS0 tsc_early_khz=" + strconv.Itoa(tsc.KHz()),
		"-serial", "file:" + g.console,
		"-device", "virtio-serial-pci", "-device", "virtio-rng-pci",
		"-chardev", "socket,id=agent,path=" + g.socket + ",server=on,wait=off",
		"-device", "virtserialport,chardev=agent,name=kata.agent.0",
		"-chardev", "socket,id=fs,path=" + fsSocket,
		"-device", "vhost-user-fs-pci,chardev=fs,tag=" + shareTag,
		// A network interface that cannot reach the host or the outside.
		"-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,mac=" + testMAC,
	}, extra, []string{"-accel", "tcg"})...), g.exited) // QEMU uses the first accelerator, which may be in extra
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(g.console)
			t.Logf("guest console:\n%s", log)
		}
	})
	g.hangUp = func() {}
	g.dial = func() {
		ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
		defer cancel()
		// QEMU does not listen yet if it has just been started.
		waitFor(t, "the agent's response", func() error {
			select {
			case <-g.exited:
				t.Fatal("QEMU has exited")
			default:
			}
			return g.connect(ctx)
		})
	}
	t.Cleanup(func() { g.hangUp() })
	g.dial()
	g.bootTime = time.Since(started)
	return g
}

// connect opens a connection and keeps it if the agent responds.
func (g *guest) connect(ctx context.Context) error {
	conn, err := net.Dial("unix", g.socket)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(conn, g.options...)
	g.client, g.hangUp = client, func() { client.Close() }
	g.AgentServiceService, g.health = pb.NewAgentServiceClient(client), pb.NewHealthClient(client)
	if _, err := g.health.Check(ctx, &pb.CheckRequest{}); err != nil {
		g.hangUp()
		return err
	}
	return nil
}

// startProcess runs cmd until the test ends. It closes exited, unless it is nil, when the process has exited.
func startProcess(t *testing.T, name string, cmd *exec.Cmd, exited chan struct{}) {
	t.Helper()
	if exited == nil {
		exited = make(chan struct{})
	}
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
		if t.Failed() {
			t.Logf("%s:\n%s", name, output.Bytes())
		}
	})
}

// waitFor calls try until it returns nil. It ends the test after bootLimit.
func waitFor(t *testing.T, what string, try func() error) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(bootLimit); ; <-tick.C {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("wait for %s: %v", what, err)
		}
	}
}

// moduleRoot returns the directory with go.mod.
func moduleRoot(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
	}
	t.Fatal("found no go.mod in the test's directory and its parents")
	return ""
}

// buildRoot creates a container's root with the test tool in the share, and returns the container's spec.
func buildRoot(t *testing.T, g *guest, id string) *pb.Spec {
	t.Helper()
	root := filepath.Join(g.share, id, "rootfs")
	if err := os.MkdirAll(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	passwd := "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n"
	if err := os.WriteFile(filepath.Join(root, "etc/passwd"), []byte(passwd), 0o644); err != nil {
		t.Fatal(err)
	}
	addTool(t, root)
	return buildSpec(id)
}

// addTool writes the test tool to a container's root.
func addTool(t *testing.T, root string) {
	t.Helper()
	program, err := testTool()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "tool"), program, 0o755); err != nil {
		t.Fatal(err)
	}
}

// testTool builds the program that runs in the containers. It builds it only once.
var testTool = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "tool")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "tool")
	build := exec.Command("go", "build", "-o", file, "./testdata/tool")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the test tool: %w\n%s", err, out)
	}
	return os.ReadFile(file)
})

// buildSpec returns a spec like containerd's default spec, with the root of the container id.
func buildSpec(id string) *pb.Spec {
	return &pb.Spec{
		Root:     &pb.Root{Path: filepath.Join(shimShare, id, "rootfs")},
		Hostname: "box",
		Process:  tool("wait"),
		Mounts: []*pb.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/shm", Type: "bind", Source: "/run/kata-containers/sandbox/shm", Options: []string{"rbind"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro", "nosuid", "noexec", "nodev", "relatime"}},
			{Destination: "/.msb/portal", Type: "msb-guest", Source: "/msb-portal", Options: []string{"ro"}},
		},
		Linux: &pb.Linux{
			Resources: &pb.LinuxResources{
				Memory: &pb.LinuxMemory{Limit: 96 << 20},
				CPU:    &pb.LinuxCPU{Shares: 1024, Quota: 150_000, Period: 100_000},
			},
			Namespaces:    []*pb.LinuxNamespace{{Type: "ipc"}, {Type: "uts"}, {Type: "mount"}},
			MaskedPaths:   []string{"/proc/kcore", "/proc/keys", "/proc/absent", "/sys/firmware"},
			ReadonlyPaths: []string{"/proc/sys", "/proc/absent"},
			Sysctl:        map[string]string{"net.ipv4.ip_unprivileged_port_start": "80"},
		},
	}
}

// tool returns a process that runs the test tool as root with few capabilities.
func tool(args ...string) *pb.Process {
	caps := []string{"CAP_CHOWN", "CAP_NET_BIND_SERVICE", "CAP_KILL"}
	return &pb.Process{
		User: &pb.User{},
		Args: append([]string{"/tool"}, args...),
		Env:  []string{"PATH=/usr/bin:/bin", "X=y"},
		Cwd:  "/srv",
		Capabilities: &pb.LinuxCapabilities{
			Bounding: caps, Effective: caps, Permitted: caps,
		},
		Rlimits:         []*pb.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 2048}},
		NoNewPrivileges: true,
	}
}

// result is a program's output and exit status.
type result struct {
	stdout, stderr string
	status         int32
}

func (r result) String() string {
	return fmt.Sprintf("stdout %q, stderr %q, status %d", r.stdout, r.stderr, r.status)
}

// read collects a stream until its end.
func (g *guest) read(ctx context.Context, read func(context.Context, *pb.ReadStreamRequest) (*pb.ReadStreamResponse, error), cid, exec string) string {
	var b strings.Builder
	for {
		resp, err := read(ctx, &pb.ReadStreamRequest{ContainerId: cid, ExecId: exec, Len: 32 << 10})
		if err != nil {
			return b.String()
		}
		b.Write(resp.Data)
	}
}

// finish waits for a process as the shim does: first for the end of its streams, then for its status.
func (g *guest) finish(t *testing.T, cid, exec string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	stderr := make(chan string)
	go func() { stderr <- g.read(ctx, g.ReadStderr, cid, exec) }()
	var r result
	r.stdout = g.read(ctx, g.ReadStdout, cid, exec)
	r.stderr = <-stderr
	resp, err := g.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: cid, ExecId: exec})
	if err != nil {
		t.Fatalf("wait for %s: %v", exec, err)
	}
	r.status = resp.Status
	return r
}

// run runs a process in a container and returns its result.
func (g *guest) run(t *testing.T, cid, exec string, p *pb.Process) result {
	t.Helper()
	g.exec(t, cid, exec, p)
	return g.finish(t, cid, exec)
}

// exec starts a process in a container.
func (g *guest) exec(t *testing.T, cid, exec string, p *pb.Process) {
	t.Helper()
	if _, err := g.ExecProcess(t.Context(), &pb.ExecProcessRequest{ContainerId: cid, ExecId: exec, Process: p}); err != nil {
		t.Fatalf("exec %v: %v", p.Args, err)
	}
}
