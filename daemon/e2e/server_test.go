// Package e2e tests the whole system as its users meet it: the built programs, a real containerd,
// real microVMs, HTTP and the command line. Nothing here reaches into the daemon.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/namespaces"
	"github.com/containerd/containerd/snapshots"
)

// bin is where `make build guest images` leaves what is tested.
var bin = func() string {
	dir, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	return filepath.Join(dir, "..", "..", "bin")
}()

// root is the checkout.
var root = filepath.Dir(bin)

func TestMain(m *testing.M) {
	for _, f := range []string{"msb", "msbd", "containerd", "containerd-shim-kata-v2", "guest/vmlinux", "guest/initrd.img", "images/python.tar", "images/node.tar"} {
		if _, err := os.Stat(filepath.Join(bin, f)); err != nil {
			fmt.Fprintf(os.Stderr, "%s is missing: run `make build guest images` first\n", f)
			os.Exit(1)
		}
	}
	code := m.Run()
	if code != 0 && shared.server != nil {
		fmt.Fprintf(os.Stderr, "the shared server's log:\n%s", shared.server.log)
	}
	if err := closeShared(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// server is a msbd of a test's own: its directories, socket and port are no other's.
type server struct {
	dir     string // short, because Unix sockets lie below it
	runDir  string
	address string
	cmd     *exec.Cmd
	log     *bytes.Buffer
	done    chan struct{}
	flags   []string
}

// newServer makes the directories of a server that is not started yet. Its end is close.
func newServer(flags ...string) (*server, error) {
	dir, err := os.MkdirTemp("", "msb")
	if err != nil {
		return nil, err
	}
	return &server{dir: dir, runDir: filepath.Join(dir, "run"), flags: flags}, nil
}

// testServer starts a server for one test, and removes it and proves that nothing is left after.
func testServer(t *testing.T, flags ...string) *server {
	t.Helper()
	s, err := newServer(flags...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
		if t.Failed() && s.log != nil {
			t.Logf("the server's log:\n%s", s.log)
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
	s.log = &bytes.Buffer{}
	s.cmd = exec.Command(filepath.Join(bin, "msb"), s.args(more...)...)
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.Env = s.env()
	if err := s.cmd.Start(); err != nil {
		return err
	}
	s.done = make(chan struct{})
	go func() {
		s.cmd.Wait()
		close(s.done)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		st, err := s.status()
		if err == nil && st.State == "ready" {
			s.address = st.ListenAddress
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

// env is the environment of a msb that talks to this server, with nothing of the caller's.
func (s *server) env() []string {
	return []string{
		"PATH=" + bin + ":" + os.Getenv("PATH"), "HOME=" + s.dir,
		"MSB_SOCKET=" + filepath.Join(s.runDir, "msbd.sock"),
	}
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
	State         string `json:"state"`
	PID           int    `json:"pid"`
	ListenAddress string `json:"listen_address"`
	AuthRequired  bool   `json:"auth_required"`
	Containerd    string `json:"containerd_version"`
	Kata          string `json:"kata_version"`
	Recovery      struct{ Adopted, Lost, Removed int }
}

func (s *server) status() (status, error) {
	var st status
	out, errs, err := s.msb("server", "status", "--json")
	if err := json.Unmarshal([]byte(out), &st); err != nil {
		return st, fmt.Errorf("%w: %s%s", err, out, errs)
	}
	return st, err
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
		errs = append(errs, left(s.dir, ids))
	}
	errs = append(errs, os.RemoveAll(s.dir))
	return errors.Join(errs...)
}

// sandboxIDs lists the microVMs that the server knows.
func (s *server) sandboxIDs() []string {
	out, _, _ := s.msb("server", "list", "--json")
	var list []struct{ ID string }
	json.Unmarshal([]byte(out), &list)
	var ids []string
	for _, b := range list {
		ids = append(ids, b.ID)
	}
	return ids
}

// leftOf looks for what microVMs left on this host and in the server's containerd.
func (s *server) leftOf(ids []string) error {
	client, err := containerd.New(filepath.Join(s.runDir, "containerd.sock"), containerd.WithDefaultNamespace("msb"))
	if err != nil {
		return err
	}
	defer client.Close()
	ctx := namespaces.WithNamespace(context.Background(), "msb")
	var found []string
	containers, err := client.Containers(ctx)
	if err != nil {
		return err
	}
	for _, c := range containers {
		if slices.Contains(ids, c.ID()) {
			found = append(found, "container "+c.ID())
		}
	}
	err = client.SnapshotService("overlayfs").Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if slices.Contains(ids, i.Name) {
			found = append(found, "snapshot "+i.Name)
		}
		return nil
	})
	if len(found) > 0 {
		err = errors.Join(err, fmt.Errorf("left in containerd: %v", found))
	}
	return errors.Join(err, left("/nonexistent", ids))
}

// left looks for whatever a server or its microVMs may leave on a host.
func left(dir string, ids []string) error {
	var found []string
	ours := func(text string) bool {
		if strings.Contains(text, dir+"/") {
			return true
		}
		for _, id := range ids {
			if strings.Contains(text, id) {
				return true
			}
		}
		return false
	}
	// Processes end a moment after what they served.
	deadline := time.Now().Add(5 * time.Second)
	for {
		found = found[:0]
		for pid, text := range processTexts() {
			if ours(text) && pid != os.Getpid() {
				found = append(found, fmt.Sprintf("process %d: %s", pid, strings.ReplaceAll(text, "\x00", " ")))
			}
		}
		if len(found) == 0 || time.Now().After(deadline) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for _, line := range strings.Split(string(mounts), "\n") {
		if ours(line) {
			found = append(found, "mount "+line)
		}
	}
	patterns := []string{"/run/vc/sbs/*", "/run/vc/vm/*", "/run/kata-containers/shared/sandboxes/*", "/sys/fs/cgroup/msb/*", "/sys/fs/cgroup/*/msb/*", "/run/netns/*", dir + dir + "/run/vm/*", dir + "/run/fifo/*"}
	for _, pattern := range patterns {
		paths, _ := filepath.Glob(pattern)
		for _, p := range paths {
			if ours(p) {
				found = append(found, "path "+p)
			}
		}
	}
	taps, _ := filepath.Glob("/sys/class/net/*kata*")
	for _, tap := range taps {
		found = append(found, "interface "+tap)
	}
	if len(found) > 0 {
		return fmt.Errorf("left behind:\n  %s", strings.Join(found, "\n  "))
	}
	return nil
}

// key makes an API key.
func (s *server) key(t testing.TB, flags ...string) string {
	t.Helper()
	return strings.TrimSpace(s.mustMSB(t, append([]string{"server", "keygen"}, flags...)...))
}

func (s *server) importImages(names ...string) error {
	for _, name := range names {
		if out, stderr, err := s.msb("image", "import", filepath.Join(bin, "images", name+".tar")); err != nil {
			return fmt.Errorf("import %s: %w\n%s%s", name, err, out, stderr)
		}
	}
	return nil
}

// answer is a JSON-RPC answer and its HTTP status.
type answer struct {
	Status int
	Result json.RawMessage `json:"result"`
	Error  *struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	} `json:"error"`
}

func (a answer) String() string {
	if a.Error != nil {
		return fmt.Sprintf("HTTP %d, error %d: %s", a.Status, a.Error.Code, a.Error.Message)
	}
	return fmt.Sprintf("HTTP %d, result %s", a.Status, a.Result)
}

// call sends one JSON-RPC request. It is safe outside of the test's goroutine.
func (s *server) call(key, method string, params any) (answer, error) {
	body, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
	if err != nil {
		return answer{}, err
	}
	return s.post(key, "/api/v1/rpc", body)
}

func (s *server) post(key, path string, body []byte) (answer, error) {
	var a answer
	req, err := http.NewRequest("POST", "http://"+s.address+path, bytes.NewReader(body))
	if err != nil {
		return a, err
	}
	req.Header.Set("Content-Type", "application/json")
	if key != "" {
		req.Header.Set("Authorization", "Bearer "+key)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return a, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return a, err
	}
	a.Status = res.StatusCode
	if err := json.Unmarshal(text, &a); err != nil {
		return a, fmt.Errorf("%w: %s", err, text)
	}
	return a, nil
}

// mustCall is call for requests that must succeed; the result is decoded into out unless it is nil.
func (s *server) mustCall(t testing.TB, key, method string, params, out any) {
	t.Helper()
	a, err := s.call(key, method, params)
	if err != nil || a.Error != nil || a.Status != 200 {
		t.Fatalf("%s: %v, %v", method, a, err)
	}
	if out != nil {
		if err := json.Unmarshal(a.Result, out); err != nil {
			t.Fatalf("%s: %v: %s", method, err, a.Result)
		}
	}
}

// wantError is call for requests that must be refused.
func (s *server) wantError(t *testing.T, key, method string, params any, status, code int, text string) {
	t.Helper()
	a, err := s.call(key, method, params)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	if a.Error == nil || a.Status != status || a.Error.Code != code || !strings.Contains(a.Error.Message, text) {
		t.Errorf("%s: %v; want HTTP %d, error %d, %q", method, a, status, code, text)
	}
}

type params map[string]any

// replResult is the result of sandbox.repl.run and, with its exit code, of sandbox.command.run.
type runResult struct {
	Status   string
	ExitCode int `json:"exit_code"`
	Success  bool
	Output   []struct{ Stream, Text string }
}

// text is what a run printed to one stream.
func (r runResult) text(stream string) string {
	var b strings.Builder
	for _, o := range r.Output {
		if o.Stream == stream {
			b.WriteString(o.Text + "\n")
		}
	}
	return b.String()
}

func (s *server) python(t testing.TB, key, name, code string) runResult {
	t.Helper()
	var r runResult
	s.mustCall(t, key, "sandbox.repl.run", params{"sandbox": name, "language": "python", "code": code}, &r)
	return r
}

func (s *server) command(t testing.TB, key, name, command string, args ...string) runResult {
	t.Helper()
	var r runResult
	s.mustCall(t, key, "sandbox.command.run", params{"sandbox": name, "command": command, "args": args}, &r)
	return r
}

// processTexts is what the kernel tells of each process: its arguments and environment.
func processTexts() map[int]string {
	texts := map[int]string{}
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range paths {
		var pid int
		fmt.Sscanf(p, "/proc/%d/", &pid)
		args, _ := os.ReadFile(p)
		env, _ := os.ReadFile(filepath.Join(filepath.Dir(p), "environ"))
		texts[pid] = string(args) + string(env)
	}
	return texts
}

// processes finds the processes whose arguments or environment hold both words.
func processes(word, other string) []int {
	var pids []int
	for pid, text := range processTexts() {
		if strings.Contains(text, word) && strings.Contains(text, other) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func killAll(t *testing.T, pids []int) {
	t.Helper()
	if len(pids) == 0 {
		t.Fatal("found no process to kill")
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
}
