package hypervisor

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/protocols/hypervisor"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	programs "github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

const (
	bootTimeout = 90 * time.Second
	shimName    = "vmm-test-shim"
)

func TestMain(m *testing.M) {
	RunJailIfChild()
	if os.Args[0] == shimName {
		runFakeShim(os.Args[1], os.Args[2])
		return
	}
	os.Exit(m.Run())
}

// runFakeShim does what Kata's shim does for one sandbox. It makes each call that it reads from its standard input over a
// new connection.
func runFakeShim(socket, id string) {
	fatal := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		answer, err := callHypervisor(socket, id, in.Text())
		reply := map[string]string{"answer": answer}
		if err != nil {
			reply["error"] = err.Error()
		}
		fatal(json.NewEncoder(os.Stdout).Encode(reply))
	}
}

func callHypervisor(socket, id, method string) (answer string, err error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	client := pb.NewHypervisorClient(ttrpc.NewClient(conn))
	switch method {
	case "CreateVM":
		resp, err := client.CreateVM(ctx, &pb.CreateVMRequest{Id: id, Annotations: map[string]string{
			annotationVCPUs: "1", annotationMemory: "128",
		}})
		return resp.GetAgentSocketPath(), err
	case "StartVM":
		_, err = client.StartVM(ctx, &pb.StartVMRequest{Id: id})
	case "StopVM":
		_, err = client.StopVM(ctx, &pb.StopVMRequest{Id: id})
	default:
		err = errors.New("unknown method " + method)
	}
	return "", err
}

// A shim is a process that runs runFakeShim.
type shim struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	replies *json.Decoder
}

func startShim(t *testing.T, socket, id string) *shim {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{shimName, socket, id}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := &shim{cmd: cmd, in: in, replies: json.NewDecoder(out)}
	t.Cleanup(s.kill)
	return s
}

func (s *shim) kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

func (s *shim) call(method string) (answer string, err error) {
	if _, err := fmt.Fprintln(s.in, method); err != nil {
		return "", err
	}
	var reply struct{ Answer, Error string }
	if err := s.replies.Decode(&reply); err != nil {
		return "", err
	}
	if reply.Error != "" {
		err = errors.New(reply.Error)
	}
	return reply.Answer, err
}

func (s *shim) mustCall(t *testing.T, method string) (answer string) {
	t.Helper()
	answer, err := s.call(method)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	return answer
}

// A testService is a running Service with its own temporary directories, and its log.
type testService struct {
	*Service
	cfg  Config
	log  *safeBuffer
	stop func()
}

func newConfig(t *testing.T) Config {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "vmm") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // QEMU, or what a test runs in its place, is here
		t.Fatal(err)
	}
	guest := filepath.Join(moduleRoot(t), "bin", "guest")
	cfg := Config{
		Socket: filepath.Join(dir, "hypervisor.sock"), Dir: filepath.Join(dir, "vm"),
		Kernel: filepath.Join(guest, "vmlinux"), Initrd: filepath.Join(guest, "initrd.img"),
		Accelerator: "tcg", UIDs: process.UIDs{First: 1_900_000_000, Count: 10},
	}
	if cfg.QEMU, err = programs.FindQEMU(""); err != nil {
		t.Fatal(err)
	}
	cfg.Programs = []string{cfg.QEMU, "/bin/sleep"}                 // startMarkedProcess runs sleep
	for _, disk := range []string{imagePath(cfg), upperPath(cfg)} { // the agent reads them only when it creates a container
		writeFile(t, disk, strings.Repeat("x", 4096))
	}
	for _, file := range []string{cfg.Kernel, cfg.Initrd} {
		if _, err := os.Stat(file); err != nil {
			t.Fatalf("%v: run make guest", err)
		}
	}
	return cfg
}

func imagePath(cfg Config) string { return filepath.Join(filepath.Dir(cfg.Dir), "image") }
func upperPath(cfg Config) string { return filepath.Join(filepath.Dir(cfg.Dir), "upper") }

// testSpec returns the description of VM id.
func testSpec(cfg Config, id string) Spec {
	return Spec{
		ID: id, VCPUs: 1, MemoryMiB: 128, Disks: Disks{Image: imagePath(cfg), Upper: upperPath(cfg)}, Container: &specs.Spec{},
	}
}

func moduleRoot(t *testing.T) string {
	dir, err := os.Getwd()
	for ; err == nil; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == "/" {
			break
		}
	}
	t.Fatal("no go.mod above the test")
	return ""
}

// startService creates a Service, calls Recover, and runs Serve until the test ends or stop is called.
func startService(t *testing.T, cfg Config) (*testService, Recovery) {
	t.Helper()
	log := &safeBuffer{}
	cfg.Log = slog.New(slog.NewTextHandler(log, nil))
	service, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	recovery, err := service.Recover(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- service.Serve(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(stop)
	h := &testService{Service: service, cfg: cfg, log: log, stop: stop}
	waitUntil(t, "the service listens", func() bool {
		conn, err := net.Dial("unix", cfg.Socket)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return h, recovery
}

var vmCount atomic.Int32

// newVM returns an unused VM id. At the end of the test, the VM is removed.
func newVM(t *testing.T, cfg Config) (id string) {
	t.Helper()
	id = filepath.Base(filepath.Dir(cfg.Dir)) + fmt.Sprintf("-%d-%d", os.Getpid(), vmCount.Add(1))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
		defer cancel()
		s := &Service{cfg: cfg}
		if err := s.Remove(ctx, id); err != nil {
			t.Error(err)
		}
	})
	return id
}

// start begins to start a VM and starts its shim.
func (h *testService) start(t *testing.T, id string) *shim {
	t.Helper()
	if err := h.Start(t.Context(), testSpec(h.cfg, id)); err != nil {
		t.Fatal(err)
	}
	return startShim(t, h.cfg.Socket, id)
}

// join adds a VM, whose QEMU does not run, and its shim.
func (h *testService) join(t *testing.T, id string) *machine {
	t.Helper()
	m, err := h.create(testSpec(h.cfg, id))
	if err == nil {
		err = h.add(m)
	}
	if err == nil {
		err = h.makeDir(m)
	}
	if err != nil {
		t.Fatal(err)
	}
	startShim(t, h.cfg.Socket, id).mustCall(t, "CreateVM")
	return m
}

// boot starts a VM and connects to its agent. It connects only once, as Kata's shim does.
func (h *testService) boot(t *testing.T, id string) (*shim, agent.HealthService) {
	t.Helper()
	s := h.start(t, id)
	agentPath := s.mustCall(t, "CreateVM")
	s.mustCall(t, "StartVM")
	conn, err := net.Dial("unix", agentPath)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	t.Cleanup(func() { client.Close() })
	health := agent.NewHealthClient(client)
	checkHealth(t, health)
	return s, health
}

// killProcess kills the process of a VM with role r, as if it had crashed.
func (h *testService) killProcess(t *testing.T, id string, r role) {
	t.Helper()
	for _, p := range h.processes(t, id) {
		if found, _ := readMark(p.PID); found == r {
			if err := p.Signal(unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("the VM has no %s process", r)
}

// processes returns the processes of a VM.
func (h *testService) processes(t *testing.T, id string) []*process.Process {
	t.Helper()
	found, err := h.marked(func(dir string) bool { return dir == h.dir(id) })
	t.Cleanup(func() { process.CloseAll(found) })
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// openProcess opens process pid until the end of the test.
func openProcess(t *testing.T, pid int) *process.Process {
	t.Helper()
	p, err := process.Open(pid)
	if err != nil || p == nil {
		t.Fatalf("open process %d: %v, %v", pid, p, err)
	}
	t.Cleanup(p.Close)
	return p
}

func checkHealth(t *testing.T, health agent.HealthService) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	if _, err := health.Check(ctx, &agent.CheckRequest{}); err != nil {
		t.Fatalf("call the agent: %v", err)
	}
}

// isRemoved reports whether a VM has no record, no processes and no directory.
func (h *testService) isRemoved(t *testing.T, id string) bool {
	t.Helper()
	for _, vm := range h.VMs() {
		if vm.ID == id {
			return false
		}
	}
	return len(h.processes(t, id)) == 0 && missing(h.dir(id))
}

func missing(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, os.ErrNotExist)
}

func waitUntil(t *testing.T, what string, condition func() bool) {
	t.Helper()
	limit := time.After(bootTimeout)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("timed out waiting until %s", what)
		}
	}
}

// startMarkedProcess starts a process with the mark of a VM, as user uid. It runs program, a copy of sleep.
func startMarkedProcess(t *testing.T, uid uint32, program string, r role, dir string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(program, "1000")
	cmd.Env = markEnv(r, dir)
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	// The environment of a process becomes visible only a moment after its start.
	waitUntil(t, "its mark is visible", func() bool { found, _ := readMark(cmd.Process.Pid); return found == r })
	return cmd
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %v, want %q in it", err, part)
		}
	}
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
