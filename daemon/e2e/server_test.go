package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

// server is an msbd under test. It shares its directories, socket and port with no other server.
type server struct {
	dir        string // short, because the path of a Unix socket below it may have 107 bytes at most
	runDir     string
	containerd string // path of containerd's socket
	address    string // host and port of the HTTP gateway
	cmd        *exec.Cmd
	log        *output           // standard output and standard error
	logs       []*output         // the same of each start, in their order
	done       chan struct{}     // closed when the process has ended
	flags      []string          // of `msb server start`
	settings   map[string]string // of msbd, by name. They override the configuration file; flags override them
	importMu   sync.Mutex        // held while images are imported
	imported   map[string]bool   // the names of the images that were imported
}

// output collects the output of a process. It may be read while the process runs.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// serversDir holds a directory for each server. TestMain removes it after all tests; servers do not remove their own
// directories. An image has thousands of files, and for minutes after so many files were deleted, ext4 takes several
// times as long to create new ones (recently_deleted in fs/ext4/ialloc.c).
var serversDir string

// servers counts the servers, to name their directories.
var servers atomic.Int32

// newServer creates the directory of a server and does not start it. The caller must call close.
func newServer(flags ...string) (*server, error) {
	dir := filepath.Join(serversDir, strconv.Itoa(int(servers.Add(1))))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	run := filepath.Join(dir, "run")
	return &server{
		dir: dir, runDir: run, containerd: filepath.Join(run, "containerd.sock"),
		flags: flags, settings: hypervisorSettings, imported: map[string]bool{},
	}, nil
}

// parallel marks a test that has its own server as able to run in parallel with other tests. On KVM the test stays
// sequential: Kata's own driver creates resources there that do not carry the id of a sandbox (see unnamedLeaks), so
// those of another server would be reported as leaks.
func parallel(t *testing.T) {
	if exec.Command(filepath.Join(root, "daemon", "setup", "lab", "kvm.sh")).Run() != nil {
		t.Parallel()
	}
}

// testServer starts a server for one test. After the test it stops the server and fails the test if anything is left on
// this host.
func testServer(t *testing.T, flags ...string) *server {
	t.Helper()
	s, err := newServer(flags...)
	if err != nil {
		t.Fatal(err)
	}
	s.startFor(t)
	return s
}

// startFor starts a new server for one test, as testServer does.
func (s *server) startFor(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			s.logDiagnostics(t)
		}
		if err := s.close(); err != nil {
			t.Errorf("%v\nthe server's log:\n%s", err, s.log)
		}
	})
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
}

// pythonServer is like testServer, but the server has the Python image. It also returns a key of the server.
func pythonServer(t *testing.T, flags ...string) (*server, string) {
	t.Helper()
	s, err := newServer(flags...)
	if err == nil {
		err = s.plant()
	}
	if err != nil {
		t.Fatal(err)
	}
	s.startFor(t)
	if err := s.importImages("python"); err != nil {
		t.Fatal(err)
	}
	return s, s.newKey(t)
}

// state returns the state directory.
func (s *server) state() string { return filepath.Join(s.dir, "state") }

// args returns the arguments of msb that start this server.
func (s *server) args(more ...string) []string {
	return append(append([]string{"server", "start", "--state-dir", s.state(), "--run-dir", s.runDir, "--port", "0"}, s.flags...), more...)
}

// start runs `msb server start` in the foreground and returns when it is ready.
func (s *server) start(more ...string) error {
	if err := s.launch(more...); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), hung)
	defer cancel()
	for {
		st, err := s.adminStatus(ctx)
		if err == nil && st.GetState() == adminv1.GetStatusResponse_DAEMON_STATE_READY {
			s.address = st.GetListenAddress()
			return nil
		}
		select {
		case <-s.done:
			return fmt.Errorf("the server exited during its start:\n%s", s.log)
		case <-ctx.Done():
			return fmt.Errorf("the server is not ready (%v):\n%s", err, s.log)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// launch runs `msb server start` in the foreground and does not wait until the server is ready.
func (s *server) launch(more ...string) error {
	s.log = &output{}
	s.logs = append(s.logs, s.log)
	s.cmd = exec.Command(filepath.Join(bin, "msb"), s.args(more...)...)
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.Env = s.env()
	if err := s.cmd.Start(); err != nil {
		return err
	}
	done := make(chan struct{})
	s.done = done
	go func(cmd *exec.Cmd) {
		cmd.Wait()
		close(done)
	}(s.cmd)
	return nil
}

// env returns an environment in which msb uses this server. Of the environment of the test it contains only PATH.
func (s *server) env() []string {
	env := []string{
		"PATH=" + bin + ":" + os.Getenv("PATH"), "HOME=" + s.dir,
		"MSB_SOCKET=" + filepath.Join(s.runDir, "msbd.sock"),
		"MSBD_POOL_MIN=0", // most tests expect no other microVM than theirs; a setting overrides it
	}
	for name, value := range s.settings {
		env = append(env, "MSBD_"+strings.ToUpper(strings.ReplaceAll(name, "-", "_"))+"="+value)
	}
	return env
}

// set sets a setting of the server for its next start.
func (s *server) set(name, value string) {
	settings := map[string]string{name: value}
	for name, value := range s.settings {
		if _, ok := settings[name]; !ok {
			settings[name] = value
		}
	}
	s.settings = settings
}

// reconfigure restarts the server with settings, which override hypervisorSettings. After the test it restarts the
// server with hypervisorSettings alone. The sandboxes keep running.
func (s *server) reconfigure(t *testing.T, settings map[string]string) {
	t.Helper()
	restart := func(settings map[string]string) {
		t.Helper()
		s.mustMSB(t, "server", "stop")
		<-s.done
		s.settings = settings
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
	}
	all := maps.Clone(settings)
	for name, value := range hypervisorSettings {
		if _, ok := all[name]; !ok {
			all[name] = value
		}
	}
	t.Cleanup(func() { restart(hypervisorSettings) })
	restart(all)
}

// msb runs msb with args and returns its standard output and standard error.
func (s *server) msb(args ...string) (stdout, stderr string, err error) {
	cmd := exec.Command(filepath.Join(bin, "msb"), args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.Env = &out, &errs, s.env()
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// mustMSB is like msb but fails the test on an error, and returns only the standard output.
func (s *server) mustMSB(t testing.TB, args ...string) string {
	t.Helper()
	out, errs, err := s.msb(args...)
	if err != nil {
		t.Fatalf("msb %s: %v\n%s%s", strings.Join(args, " "), err, out, errs)
	}
	return out
}

// status is the part of the output of `msb server status --json` that the tests use.
type status struct {
	State           string   `json:"state"`
	DegradedReasons []string `json:"degraded_reasons"`
	PID             int      `json:"pid"`
	ListenAddress   string   `json:"listen_address"`
	AuthRequired    bool     `json:"auth_required"`
	Containerd      string   `json:"containerd_version"`
	Kata            string   `json:"kata_version"`
	Isolation       struct{ Hypervisor, Accelerator string }
	Recovery        struct{ Adopted, Lost, Removed int }
}

func (s *server) status() (status, error) {
	var st status
	out, errs, err := s.msb("server", "status", "--json")
	if err := json.Unmarshal([]byte(out), &st); err != nil {
		return st, fmt.Errorf("%w: %s%s", err, out, errs)
	}
	return st, err
}

// adminStatus returns the status from the admin socket. Tests that poll use it, because running msb costs 50 ms of
// processor time. Each call opens a new connection, because gRPC waits longer after each failed attempt to connect.
func (s *server) adminStatus(ctx context.Context) (*adminv1.GetStatusResponse, error) {
	a := &client.Admin{Socket: filepath.Join(s.runDir, "msbd.sock")}
	defer a.Close()
	return a.Status(ctx)
}

// list returns the sandboxes from the admin socket. The list is empty if the server is not running.
func (s *server) list() []*adminv1.Sandbox {
	a := &client.Admin{Socket: filepath.Join(s.runDir, "msbd.sock")}
	defer a.Close()
	ctx, cancel := context.WithTimeout(context.Background(), hung)
	defer cancel()
	list, _ := a.Sandboxes(ctx, "")
	return list
}

// sandboxIDs returns the ids of the sandboxes that the server lists.
func (s *server) sandboxIDs() []string {
	var ids []string
	for _, b := range s.list() {
		ids = append(ids, b.GetId())
	}
	return ids
}

// sandboxID returns the id of a sandbox, or "" if the server does not list the sandbox.
func (s *server) sandboxID(sandbox string) string {
	for _, b := range s.list() {
		if b.GetName() == sandbox {
			return b.GetId()
		}
	}
	return ""
}

// kill ends msbd with SIGKILL, as a crash would. The sandboxes keep running.
func (s *server) kill() {
	s.cmd.Process.Kill()
	<-s.done
}

// close stops the server and its sandboxes. It returns an error if anything is left on this host.
func (s *server) close() error {
	var errs []error
	if s.cmd != nil {
		select {
		case <-s.done: // the test killed the server; a new one cleans up
			if err := s.start(); err != nil {
				errs = append(errs, err)
			}
		default:
		}
		ids := s.sandboxIDs()
		if out, stderr, err := s.msb("server", "stop", "--sandboxes"); err != nil {
			errs = append(errs, fmt.Errorf("stop: %w\n%s%s%s", err, out, stderr, s.log))
			s.cmd.Process.Kill()
		}
		<-s.done
		errs = append(errs, s.leaks(s.dir, ids))
		_ = os.Remove(filepath.Join(s.state(), "ballast")) // the directory stays until the end of all tests
	}
	return errors.Join(errs...)
}

// logDiagnostics logs the output of the server, and the ends of the logs of containerd and of the microVMs, including
// the consoles of failed boots.
func (s *server) logDiagnostics(t testing.TB) {
	for _, log := range s.logs[max(0, len(s.logs)-4):] {
		t.Logf("the server's log:\n%s", log)
	}
	// Kata warns of devices that this host does not have, for each sandbox.
	noise := regexp.MustCompile(`(?m)^.*Could not add \S+ to the devices cgroup.*\n`)
	files := []string{filepath.Join(s.state(), "containerd", "containerd.log")}
	logs, _ := filepath.Glob(filepath.Join(s.runDir, "*", "*", "*.log"))
	for _, file := range append(files, logs...) {
		text, _ := os.ReadFile(file)
		if text = noise.ReplaceAll(text, nil); len(text) > 0 {
			t.Logf("the end of %s:\n%s", file, text[max(0, len(text)-4096):])
		}
	}
}

// newKey creates an API key. flags are those of `msb server keygen`.
func (s *server) newKey(t testing.TB, flags ...string) string {
	t.Helper()
	return strings.TrimSpace(s.mustMSB(t, append([]string{"server", "keygen"}, flags...)...))
}

// removeImage removes one of msbd's own images.
func (s *server) removeImage(t testing.TB, name string) {
	t.Helper()
	s.importMu.Lock()
	defer s.importMu.Unlock()
	s.mustMSB(t, "image", "rm", "microsandbox/"+name)
	delete(s.imported, name)
}

// importImages imports the images that the server does not have yet.
func (s *server) importImages(names ...string) error {
	s.importMu.Lock()
	defer s.importMu.Unlock()
	for _, name := range names {
		if s.imported[name] {
			continue
		}
		if out, stderr, err := s.msb("image", "import", filepath.Join(bin, "images", name+".tar")); err != nil {
			return fmt.Errorf("import %s: %w\n%s%s", name, err, out, stderr)
		}
		s.imported[name] = true
	}
	return nil
}
