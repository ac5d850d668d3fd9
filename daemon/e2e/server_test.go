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
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

// server is a msbd of a test's own: its directories, socket and port are no other's.
type server struct {
	dir        string // short, because Unix sockets lie below it
	runDir     string
	containerd string // the socket
	address    string
	cmd        *exec.Cmd
	log        *output
	done       chan struct{}
	flags      []string
	settings   map[string]string // msbd's, by name; over those of a file, below flags
	imported   map[string]bool
}

// output is what a process has printed; it may be read while the process goes on.
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

// serversDir holds a directory for each server. TestMain removes it at the end, not each server its own: an image has
// thousands of files, and for minutes after so many were deleted, ext4 takes several times as long to create others
// (recently_deleted in fs/ext4/ialloc.c).
var serversDir string

var servers atomic.Int32

// newServer makes the directories of a server that is not started yet. Its end is close.
func newServer(flags ...string) (*server, error) {
	dir := filepath.Join(serversDir, strconv.Itoa(int(servers.Add(1))))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	run := filepath.Join(dir, "run")
	return &server{
		dir: dir, runDir: run, containerd: filepath.Join(run, "containerd.sock"),
		flags: flags, settings: route, imported: map[string]bool{},
	}, nil
}

// parallel lets a test that has a server of its own run beside other tests. Not on KVM: Kata's own driver leaves traces
// there that do not carry a sandbox's name (see traces), so that a second server's would be taken for a leak.
func parallel(t *testing.T) {
	if exec.Command(filepath.Join(root, "daemon", "setup", "lab", "kvm.sh")).Run() != nil {
		t.Parallel()
	}
}

// testServer starts a server for one test, and removes it and proves that nothing is left after.
func testServer(t *testing.T, flags ...string) *server {
	t.Helper()
	s, err := newServer(flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			s.explain(t)
		}
		if err := s.close(); err != nil {
			t.Errorf("%v\nthe server's log:\n%s", err, s.log)
		}
	})
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *server) state() string { return filepath.Join(s.dir, "state") }
func (s *server) args(more ...string) []string {
	return append(append([]string{"server", "start", "--state-dir", s.state(), "--run-dir", s.runDir, "--port", "0"}, s.flags...), more...)
}

// start runs `msb server start` in the foreground and returns when it is ready.
func (s *server) start(more ...string) error {
	if err := s.launch(more...); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience*time.Minute)
	defer cancel()
	for {
		st, err := s.adminStatus(ctx)
		if err == nil && st.GetState() == adminv1.GetStatusResponse_DAEMON_STATE_READY {
			s.address = st.GetListenAddress()
			return nil
		}
		select {
		case <-s.done:
			return fmt.Errorf("the server ended at its start:\n%s", s.log)
		case <-ctx.Done():
			return fmt.Errorf("the server is not ready (%v):\n%s", err, s.log)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// launch runs `msb server start` in the foreground. It does not wait.
func (s *server) launch(more ...string) error {
	s.log = &output{}
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

// env is the environment of a msb that talks to this server, with nothing of the caller's.
func (s *server) env() []string {
	env := []string{
		"PATH=" + bin + ":" + os.Getenv("PATH"), "HOME=" + s.dir,
		"MSB_SOCKET=" + filepath.Join(s.runDir, "msbd.sock"),
	}
	for name, value := range s.settings {
		env = append(env, "MSBD_"+strings.ToUpper(strings.ReplaceAll(name, "-", "_"))+"="+value)
	}
	return env
}

// reconfigure stops the server, starts it with these settings over the route's, and returns it to the route's
// after the test. Its sandboxes run on.
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
	for name, value := range route {
		if _, ok := all[name]; !ok {
			all[name] = value
		}
	}
	t.Cleanup(func() { restart(route) })
	restart(all)
}

// msb runs the command line. stdout and stderr are returned apart.
func (s *server) msb(args ...string) (stdout, stderr string, err error) {
	cmd := exec.Command(filepath.Join(bin, "msb"), args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.Env = &out, &errs, s.env()
	err = cmd.Run()
	return out.String(), errs.String(), err
}

func (s *server) mustMSB(t testing.TB, args ...string) string {
	t.Helper()
	out, errs, err := s.msb(args...)
	if err != nil {
		t.Fatalf("msb %s: %v\n%s%s", strings.Join(args, " "), err, out, errs)
	}
	return out
}

// status is what `msb server status --json` prints.
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

// adminStatus asks for the status over the admin socket. Tests that poll use it: running msb costs 50 ms of
// processor time. Each call connects again, because gRPC waits longer and longer between attempts.
func (s *server) adminStatus(ctx context.Context) (*adminv1.GetStatusResponse, error) {
	a := &client.Admin{Socket: filepath.Join(s.runDir, "msbd.sock")}
	defer a.Close()
	return a.Status(ctx)
}

// list lists the sandboxes, over the admin socket. Without a server the list is empty.
func (s *server) list() []*adminv1.Sandbox {
	a := &client.Admin{Socket: filepath.Join(s.runDir, "msbd.sock")}
	defer a.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience*time.Minute)
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

// id returns the id of a sandbox, or "" if the server does not list the sandbox.
func (s *server) id(sandbox string) string {
	for _, b := range s.list() {
		if b.GetName() == sandbox {
			return b.GetId()
		}
	}
	return ""
}

// kill ends msbd as a crash would. Its sandboxes run on.
func (s *server) kill() {
	s.cmd.Process.Kill()
	<-s.done
}

// close stops the server with its sandboxes, and says what it left on this host.
func (s *server) close() error {
	var errs []error
	if s.cmd != nil {
		select {
		case <-s.done: // killed by the test: a new one cleans up
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
		errs = append(errs, s.left(s.dir, ids))
	}
	return errors.Join(errs...)
}

// explain logs all that a server and its microVMs have said, the consoles of failed boots included.
func (s *server) explain(t testing.TB) {
	t.Logf("the server's log:\n%s", s.log)
	files := []string{filepath.Join(s.state(), "containerd", "containerd.log")}
	logs, _ := filepath.Glob(filepath.Join(s.runDir, "*", "*", "*.log"))
	for _, file := range append(files, logs...) {
		if text, _ := os.ReadFile(file); len(text) > 0 {
			t.Logf("the end of %s:\n%s", file, text[max(0, len(text)-4096):])
		}
	}
}

// key makes an API key.
func (s *server) key(t testing.TB, flags ...string) string {
	t.Helper()
	return strings.TrimSpace(s.mustMSB(t, append([]string{"server", "keygen"}, flags...)...))
}

// importImages imports those that the server does not have yet.
func (s *server) importImages(names ...string) error {
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
