package client_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
	"github.com/msbd/msbd/daemon/daemontest"
)

// The tests in this file use a server whose sandboxes run real programs on this host. The end-to-end tests of package daemon test
// the same against real microVMs.

func TestMain(m *testing.M) {
	daemontest.MaybeChild()
	os.Exit(m.Run())
}

// startServer starts a server, and returns a client of it.
func startServer(t *testing.T) *client.Client {
	t.Helper()
	server, err := daemontest.StartWithPortals(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	key, err := server.Key()
	if err != nil {
		t.Fatal(err)
	}
	return &client.Client{ServerURL: server.URL(), Key: client.NewKey(key)}
}

// startSandbox starts a server and a sandbox, whose programs start in the directory home.
func startSandbox(t *testing.T) (s *client.Sandbox, home string) {
	t.Helper()
	s = startServer(t).Sandbox("", "my-env")
	if err := s.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	p, err := s.StartProcess(t.Context(), client.Command{Name: "pwd", Attachment: client.Attachment{Stdout: &out}})
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(); err != nil || exit.ExitCode != 0 {
		t.Fatalf("%+v, %v", exit, err)
	}
	return s, strings.TrimSpace(out.String())
}

func TestRun(t *testing.T) {
	t.Parallel()
	s, home := startSandbox(t)
	const code = `
import sys
class Image:
    def _repr_png_(self): return b"\x89PNG\r\n\x1a\n"
print("one")
display(Image())
print("two", file=sys.stderr)
x = 6 * 7
x`
	execution, err := s.Run(t.Context(), client.Code{Language: "python", Source: code})
	if err != nil {
		t.Fatal(err)
	}
	check := func(e *client.Execution) {
		t.Helper()
		if e.Text() != "42" || string(e.PNG()) != "\x89PNG\r\n\x1a\n" || len(e.Results) != 2 || e.Err() != nil {
			t.Errorf("got %+v", e)
		}
	}
	check(execution)
	if execution.Stdout != "one\n" || execution.Stderr != "two\n" || execution.Count != 1 {
		t.Errorf("got %+v", execution)
	}

	var all strings.Builder
	execution, err = s.Run(t.Context(), client.Code{
		Language: "python", Source: code, Stdout: &all, Stderr: &all,
		OnResult: func(r client.Result) error { fmt.Fprintf(&all, "[%s]", slices.Sorted(mapKeys(r))); return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	check(execution)
	if got, want := all.String(), "one\n[[image/png text/plain]]two\n[[text/plain]]"; got != want {
		t.Errorf("streamed %q, want %q", got, want)
	}

	// Options, and output that is not text.
	execution, err = s.Run(t.Context(), client.Code{
		Language: "python", Source: `import os, sys; sys.stdout.buffer.write(sys.stdin.buffer.read() + (os.getcwd() + os.environ["A"]).encode())`,
		Dir: "/", Env: []string{"A=b"}, Stdin: []byte("\xff\x00"),
	})
	if err != nil || execution.Stdout != "\xff\x00/b" {
		t.Errorf("got %+v, %v", execution, err)
	}

	execution, err = s.Run(t.Context(), client.Code{Language: "python", Source: "1 / 0"})
	var failure *client.ExecutionError
	if err != nil || !errors.As(execution.Err(), &failure) || failure.Error() != "ZeroDivisionError: division by zero" || !strings.Contains(failure.Exception.Traceback, "1 / 0") {
		t.Errorf("got %+v, %v, %v", execution, execution.Err(), err)
	}

	// A time limit, with what was printed before it.
	const slow = "import time; print('before', flush=True); time.sleep(60)"
	execution, err = s.Run(t.Context(), client.Code{Language: "python", Source: slow, Timeout: time.Second})
	if !errors.Is(err, client.ErrRunTimeout) || execution == nil || execution.Stdout != "before\n" {
		t.Errorf("got %+v, %v", execution, err)
	}
	all.Reset()
	_, err = s.Run(t.Context(), client.Code{Language: "python", Source: slow, Timeout: time.Second, Stdout: &all})
	if e, ok := errors.AsType[*client.Error](err); !ok || !errors.Is(err, client.ErrRunTimeout) || !e.Output.TimedOut || all.String() != "before\n" {
		t.Errorf("got %q, %v", all.String(), err)
	}

	// A writer that fails interrupts the run; the session goes on.
	full := errors.New("no space")
	_, err = s.Run(t.Context(), client.Code{Language: "python", Source: "while True: print('more')", Stdout: writerFunc(func([]byte) (int, error) { return 0, full })})
	if err != full {
		t.Errorf("got %v", err)
	}
	if execution, err = s.Run(t.Context(), client.Code{Language: "python", Source: "x"}); err != nil || execution.Text() != "42" {
		t.Errorf("got %+v, %v", execution, err)
	}
	if _, err := os.Stat(home); err != nil {
		t.Error(err)
	}
}

// Code that is interrupted continues, and Run returns what it has printed.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	s, _ := startSandbox(t)
	for _, streams := range []bool{false, true} {
		fifo := filepath.Join(t.TempDir(), "fifo")
		if err := syscall.Mkfifo(fifo, 0o600); err != nil {
			t.Fatal(err)
		}
		interrupt := make(chan struct{})
		go func() {
			_, _ = os.ReadFile(fifo) // ends when the code has closed it
			close(interrupt)
		}()
		var printed strings.Builder
		code := client.Code{
			Language: "python", Interrupt: interrupt,
			Source: fmt.Sprintf("import time\ntry:\n open(%q, 'w').close()\n time.sleep(60)\nexcept KeyboardInterrupt: print('stopped')", fifo),
		}
		if streams {
			code.Stdout = &printed
		}
		execution, err := s.Run(t.Context(), code)
		if err != nil || execution.Err() != nil || execution.Stdout+printed.String() != "stopped\n" {
			t.Errorf("streams %t: got %+v, %v, printed %q", streams, execution, err, &printed)
		}
	}
}

func mapKeys(r client.Result) func(func(string) bool) {
	return func(yield func(string) bool) {
		for name := range r.Data {
			if !yield(name) {
				return
			}
		}
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestContexts(t *testing.T) {
	t.Parallel()
	s, _ := startSandbox(t)
	ctx := t.Context()
	c, err := s.CreateContext(ctx, client.ContextOptions{Language: "python", Name: "report", Dir: "/tmp"})
	if err != nil || c.Context != "report" || c.PID == 0 {
		t.Fatalf("got %+v, %v", c, err)
	}
	run := func(code string) string {
		t.Helper()
		e, err := s.Run(ctx, client.Code{Context: "report", Source: code})
		if err != nil || e.Err() != nil {
			t.Fatalf("got %+v, %v", e, err)
		}
		return e.Text()
	}
	run("x = 5")
	if got := run("import os; (x, os.getcwd())"); got != "(5, '/tmp')" {
		t.Errorf("got %s", got)
	}
	restarted, err := s.RestartContext(ctx, "report")
	if err != nil || restarted.PID == c.PID || restarted.Count != 0 {
		t.Errorf("got %+v, %v", restarted, err)
	}
	if e, err := s.Run(ctx, client.Code{Context: "report", Source: "x"}); err != nil || e.Exception == nil || e.Exception.Name != "NameError" {
		t.Errorf("got %+v, %v", e, err)
	}
	if all, err := s.Contexts(ctx); err != nil || len(all) != 1 || all[0].Context != "report" {
		t.Errorf("got %+v, %v", all, err)
	}
	if err := s.RemoveContext(ctx, "report"); err != nil {
		t.Error(err)
	}
	if _, err := s.Run(ctx, client.Code{Context: "report", Source: "x"}); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}

func TestProcesses(t *testing.T) {
	t.Parallel()
	s, _ := startSandbox(t)
	ctx := t.Context()

	// Bytes are not altered, and more than a program accepts at once is not lost.
	input := make([]byte, 3<<20)
	rand.Read(input)
	var out, errOut bytes.Buffer
	p, err := s.StartProcess(ctx, client.Command{
		Name: "sh", Args: []string{"-c", `cat; echo "$A $(pwd)" >&2; exit 3`}, Env: []string{"A=b"}, Dir: "/",
		Attachment: client.Attachment{Stdin: bytes.NewReader(input), Stdout: &out, Stderr: &errOut},
	})
	if err != nil {
		t.Fatal(err)
	}
	exit, err := p.Wait()
	if err != nil || exit.ExitCode != 3 || !bytes.Equal(out.Bytes(), input) || errOut.String() != "b /\n" {
		t.Errorf("got %+v, %v, %d bytes, %q", exit, err, out.Len(), errOut.String())
	}

	if _, err := s.StartProcess(ctx, client.Command{Name: "no-such-program"}); !errors.Is(err, client.ErrCommandNotFound) {
		t.Errorf("got %v", err)
	}

	// An error of the input is not its end.
	broken := errors.New("disk failure")
	out.Reset()
	if p, err = s.StartProcess(ctx, client.Command{
		Name: "sh", Args: []string{"-c", "cat; echo complete"}, Attachment: client.Attachment{Stdin: iotest.ErrReader(broken), Stdout: &out},
	}); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(); !errors.Is(err, broken) || out.Len() > 0 {
		t.Errorf("got %+v, %v, %q", exit, err, out.String())
	}

	// Without Stdin, there is no input. A time limit ends the process.
	if p, err = s.StartProcess(ctx, client.Command{Name: "cat"}); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(); err != nil || exit.ExitCode != 0 {
		t.Errorf("got %+v, %v", exit, err)
	}
	if p, err = s.StartProcess(ctx, client.Command{Name: "sleep", Args: []string{"60"}, Timeout: 100 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(); err != nil || !exit.TimedOut || exit.Signal != "TERM" {
		t.Errorf("got %+v, %v", exit, err)
	}

	// The end of the connection ends the process, but not a detached one.
	if p, err = s.StartProcess(ctx, client.Command{Name: "sleep", Args: []string{"60"}}); err != nil {
		t.Fatal(err)
	}
	p.Close()
	if _, err := p.Wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	for pid := p.PID; unix.Kill(pid, 0) != unix.ESRCH; { // the sandbox's processes are those of this host
		runtime.Gosched()
	}
	if p, err = s.StartProcess(ctx, client.Command{
		Name: "sh", Args: []string{"-c", "echo ready; exec cat"}, Tag: "worker", Detached: true, Attachment: client.Attachment{Stdin: neverRead{}},
	}); err != nil {
		t.Fatal(err)
	}
	p.Close()
	id := client.ProcessID{Tag: "worker"}
	all, err := s.Processes(ctx)
	if i := slices.IndexFunc(all, func(i rpc.ProcessInfo) bool { return i.PID == p.PID }); err != nil || i < 0 || all[i].Tag != "worker" || !all[i].Running {
		t.Fatalf("got %+v, %v", all, err)
	}
	out.Reset()
	seen := make(chan string, 10)
	attached, err := s.AttachProcess(ctx, id, true, client.Attachment{
		Stdin: strings.NewReader("hello\n"), Stdout: writerFunc(func(p []byte) (int, error) { seen <- string(p); return len(p), nil }),
	})
	if err != nil || attached.PID != p.PID {
		t.Fatalf("got %+v, %v", attached, err)
	}
	if exit, err := attached.Wait(); err != nil || exit.ExitCode != 0 {
		t.Errorf("got %+v, %v", exit, err)
	}
	close(seen)
	text := ""
	for piece := range seen {
		text += piece
	}
	if text != "ready\nhello\n" {
		t.Errorf("got %q", text)
	}
	logs, err := s.ProcessLogs(ctx, id)
	if err != nil || logs.Running || len(logs.Output) == 0 || string(logs.Output[0].Base64) != "ready\nhello\n" {
		t.Errorf("got %+v, %v", logs, err)
	}

	// Signals.
	if p, err = s.StartProcess(ctx, client.Command{Name: "sleep", Args: []string{"60"}, Detached: true}); err != nil {
		t.Fatal(err)
	}
	if state, err := s.WaitProcess(ctx, client.ProcessID{PID: p.PID}, time.Millisecond); err != nil || !state.Running {
		t.Errorf("got %+v, %v", state, err)
	}
	if err := p.Signal("INT", false); err != nil {
		t.Error(err)
	}
	if exit, err := p.Wait(); err != nil || exit.Signal != "INT" {
		t.Errorf("got %+v, %v", exit, err)
	}
	if err := s.SignalProcess(ctx, client.ProcessID{PID: 1 << 22}, "TERM", false); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}

// neverRead is standard input that never comes.
type neverRead struct{}

func (neverRead) Read([]byte) (int, error) { select {} }

func TestTerminal(t *testing.T) {
	t.Parallel()
	s, _ := startSandbox(t)
	const program = `
import os, select, signal, sys
def size(*_): os.write(1, b"%d columns\n" % os.get_terminal_size().columns)
signal.signal(signal.SIGWINCH, size)
signal.signal(signal.SIGINT, lambda *_: sys.exit(7))
size()
while True:
    if select.select([0], [], [], 0.02)[0]: # a signal before a read would wait for the end of the read
        os.write(1, b"got " + os.read(0, 100))`
	input, keyboard := io.Pipe()
	output, screen := io.Pipe()
	p, err := s.StartProcess(t.Context(), client.Command{
		Name: "python3", Args: []string{"-c", program}, Terminal: &rpc.TerminalSize{Cols: 90, Rows: 30},
		Attachment: client.Attachment{Stdin: input, Stdout: screen},
	})
	if err != nil {
		t.Fatal(err)
	}
	until := func(text string) {
		t.Helper()
		var seen []byte
		for b := make([]byte, 1); !bytes.HasSuffix(seen, []byte(text)); seen = append(seen, b[0]) {
			if _, err := output.Read(b); err != nil {
				t.Fatalf("%v after %q", err, seen)
			}
		}
	}
	until("90 columns\r\n")
	if err := p.Resize(rpc.TerminalSize{Cols: 100, Rows: 40}); err != nil {
		t.Error(err)
	}
	until("100 columns\r\n")
	fmt.Fprint(keyboard, "hello\r")
	until("got hello\r\n")
	go io.Copy(io.Discard, output)
	fmt.Fprint(keyboard, "\x03")
	if exit, err := p.Wait(); err != nil || exit.ExitCode != 7 {
		t.Errorf("got %+v, %v", exit, err)
	}
}

func TestFiles(t *testing.T) {
	t.Parallel()
	s, home := startSandbox(t)
	ctx := t.Context()
	f := s.Files()
	content := make([]byte, 5<<20)
	rand.Read(content)
	info, err := f.Write(ctx, "data/new file", bytes.NewReader(content), client.WriteOptions{Mode: "0640"})
	if err != nil || info.Path != home+"/data/new file" || info.Size != len(content) || info.Mode != "0640" {
		t.Fatalf("got %+v, %v", info, err)
	}
	if got, err := f.Read(ctx, "data/new file"); err != nil || !bytes.Equal(got, content) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	r, err := f.Open(ctx, "data/new file")
	if err != nil || r.Size != int64(len(content)) || time.Since(r.ModifiedAt) > time.Hour {
		t.Fatalf("got %+v, %v", r, err)
	}
	r.Close()
	if _, err := f.Read(ctx, "nothing"); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
	if _, err := f.Read(ctx, "data"); !errdefs.IsConflict(err) {
		t.Errorf("got %v", err)
	}
	if _, err := f.Stat(ctx, "nothing"); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
	if dir, err := f.Mkdir(ctx, "a/b", client.WriteOptions{Mode: "0700"}); err != nil || !dir.Created || dir.Mode != "0700" {
		t.Errorf("got %+v, %v", dir, err)
	}
	if moved, err := f.Move(ctx, "data/new file", "a/b/c"); err != nil || moved.Path != home+"/a/b/c" {
		t.Errorf("got %+v, %v", moved, err)
	}
	list, err := f.List(ctx, ".", 3)
	var names []string
	for _, e := range list {
		names = append(names, strings.TrimPrefix(e.Path, home))
	}
	if err != nil || !slices.Equal(names, []string{"/a", "/a/b", "/a/b/c", "/data"}) {
		t.Errorf("got %q, %v", names, err)
	}
	if err := f.Remove(ctx, "a", false); !errdefs.IsConflict(err) {
		t.Errorf("got %v", err)
	}
	if err := f.Remove(ctx, "a", true); err != nil {
		t.Error(err)
	}

	var changes []rpc.FSChange
	stop := errors.New("stop")
	err = f.Watch(ctx, "data", false, func() error {
		return os.WriteFile(home+"/data/seen", nil, 0o600)
	}, func(c rpc.FSChange) error {
		changes = append(changes, c)
		return stop
	})
	if err != stop || changes[0].Type != rpc.FSCreate || changes[0].Path != "seen" {
		t.Errorf("got %+v, %v", changes, err)
	}
}

func TestForward(t *testing.T) {
	t.Parallel()
	s, _ := startSandbox(t)
	inside, err := net.Listen("tcp", "127.0.0.1:0") // the ports of the sandbox are those of this host
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %d", r.URL.Path, len(body))
	})}
	go server.Serve(inside)
	t.Cleanup(func() { server.Close() })
	_, port, _ := net.SplitHostPort(inside.Addr().String())
	number, _ := strconv.Atoi(port)

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Forward(ctx, l, number, func(err error) { t.Error(err) }) }()
	for range 3 {
		h := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		res, err := h.Post("http://"+l.Addr().String()+"/path", "text/plain", bytes.NewReader(make([]byte, 1<<20)))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		if err != nil || string(body) != "/path 1048576" {
			t.Errorf("got %q, %v", body, err)
		}
		res.Body.Close()
	}
	// A client that ends its half of the connection still gets the answer.
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET /half HTTP/1.0\r\n\r\n")
	conn.(*net.TCPConn).CloseWrite()
	if answer, err := io.ReadAll(conn); err != nil || !strings.HasSuffix(string(answer), "/half 0") {
		t.Errorf("got %q, %v", answer, err)
	}
	open, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if _, err := open.Read(make([]byte, 1)); err == nil {
		t.Error("a connection is still open")
	}
	if _, err := s.DialPort(t.Context(), 1); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}

// A start creates the workdir for the user of the sandbox. What runs in the sandbox, and the files that are written there, are
// that user's, unless a request names another one.
func TestUserAndWorkdir(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can run programs as another user")
	}
	dir, err := os.MkdirTemp("", "client-test-") // other users cannot enter t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	workdir := filepath.Join(dir, "above", "work")
	s := startServer(t).Sandbox("", "my-env")
	config := &rpc.SandboxConfig{User: "nobody", Workdir: workdir}
	for range 2 { // the second start changes nothing
		if err := s.Start(t.Context(), config); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{workdir, filepath.Dir(workdir)} {
		if info, err := s.Files().Stat(t.Context(), path); err != nil || info.User != "nobody" || info.Mode != "0755" {
			t.Errorf("%s: got %+v, error %v, want a directory with the mode 0755 and the owner nobody", path, info, err)
		}
	}
	for user, want := range map[string]string{"": "nobody " + workdir + "\n", "root": "root " + workdir + "\n"} {
		var out bytes.Buffer
		p, err := s.StartProcess(t.Context(), client.Command{
			Name: "sh", Args: []string{"-c", `echo "$(id -un) $(pwd)"`}, User: user, Attachment: client.Attachment{Stdout: &out},
		})
		if err != nil {
			t.Fatal(err)
		}
		if exit, err := p.Wait(); err != nil || exit.ExitCode != 0 || out.String() != want {
			t.Errorf("program as %q: got %q, %+v, error %v, want %q", user, out.String(), exit, err, want)
		}
	}
	if r, err := s.RunCode(t.Context(), "bash", `echo "$(id -un) $(pwd)"`, time.Minute); err != nil ||
		len(r.Output) != 1 || r.Output[0].Text != "nobody "+workdir {
		t.Errorf("code: got %+v, error %v", r, err)
	}
	for user, want := range map[string]string{"": "nobody", "root": "root"} {
		info, err := s.Files().Write(t.Context(), "file-of-"+want, strings.NewReader("x"), client.WriteOptions{User: user})
		if err != nil || info.User != want || filepath.Dir(info.Path) != workdir {
			t.Errorf("file of %q: got %+v, error %v, want a file of %s in %s", user, info, err, want, workdir)
		}
	}
}

// A start with a user or a workdir that the sandbox refuses says so, and leaves no sandbox behind.
func TestRefusedUserAndWorkdir(t *testing.T) {
	t.Parallel()
	c := startServer(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for want, config := range map[string]rpc.SandboxConfig{
		`config.user: user "no-such-user" does not exist in the sandbox`:                                           {User: "no-such-user"},
		`config.user: group "no-such-group" does not exist in the sandbox`:                                         {User: "0:no-such-group"},
		fmt.Sprintf("config.workdir: %q is not a directory", file):                                                 {Workdir: file},
		fmt.Sprintf("config.workdir: %q cannot be used: it, or a part of its path, is not a directory", file+"/a"): {Workdir: file + "/a"},
		`config.workdir: "/proc/no-such-directory" does not exist`:                                                 {Workdir: "/proc/no-such-directory"},
	} {
		err := c.Sandbox("", "refused").Start(t.Context(), &config)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "sandbox default/refused was not started: "+want) {
			t.Errorf("%+v: got error %v, want %s", config, err, want)
		}
	}
	if all, err := c.ListSandboxes(t.Context(), "*"); err != nil || len(all) != 0 {
		t.Errorf("got %+v, error %v, want no sandbox", all, err)
	}
}

// The end of the server ends streams and processes with an error that says so.
func TestServerEnds(t *testing.T) {
	t.Parallel()
	server, err := daemontest.StartWithPortals(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	key, err := server.Key()
	if err != nil {
		t.Fatal(err)
	}
	s := (&client.Client{ServerURL: server.URL(), Key: client.NewKey(key)}).Sandbox("", "a")
	if err := s.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	p, err := s.StartProcess(t.Context(), client.Command{Name: "sleep", Args: []string{"60"}, Detached: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	if exit, err := p.Wait(); !errdefs.IsUnavailable(err) && !errors.Is(err, client.ErrRunFailed) {
		t.Errorf("got %+v, %v", exit, err)
	}
	if _, err := s.StartProcess(t.Context(), client.Command{Name: "true"}); !errors.Is(err, client.ErrNotRunning) {
		t.Errorf("got %v", err)
	}
}
