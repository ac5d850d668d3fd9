package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// cgroupRoot returns where the host's cgroup2 file system is mounted.
func cgroupRoot(t testing.TB) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); f[2] == "cgroup2" {
			return f[1]
		}
	}
	t.Fatal("this machine has no cgroup2 file system")
	return ""
}

// startGuestInCgroup starts `msb-portal serve` with cgroups, as the guest's agent does, and as the user uid. It returns the
// path of the cgroup "processes".
func startGuestInCgroup(t testing.TB, uid int) (g *guest, processes string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can create cgroups")
	}
	g = newGuest()
	container := filepath.Join(cgroupRoot(t), strings.TrimPrefix(g.socket, "@"))
	processes = container + "/load/processes"
	if err := os.MkdirAll(processes, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(container+"/cgroup.kill", []byte("1"), 0); err != nil {
			t.Error(err)
		}
		for removeGroup(container) != nil { // until the killed processes are gone
		}
	})
	serve := msbPortal(t, "serve", g.socket)
	for _, dir := range []string{container, processes} {
		f, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		serve.ExtraFiles = append(serve.ExtraFiles, f)
	}
	if uid != 0 {
		for _, name := range []string{container + "/cgroup.procs", container + "/load/cgroup.procs", processes, processes + "/cgroup.procs"} {
			if err := os.Chown(name, uid, -1); err != nil {
				t.Fatal(err)
			}
		}
		serve.Path, serve.Dir = "/proc/self/exe", "/" // the user may not enter the directory of the test's program
		group, err := os.Open(container)
		if err != nil {
			t.Fatal(err)
		}
		defer group.Close()
		serve.SysProcAttr = &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}, UseCgroupFD: true, CgroupFD: int(group.Fd()),
		}
	}
	g.start(t, serve)
	return g, processes
}

// removeGroup removes a cgroup and those below it.
func removeGroup(path string) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeGroup(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
	}
	return syscall.Rmdir(path)
}

// guests starts a portal without cgroups, one with cgroups, and one with cgroups that is not root.
func guests(t *testing.T, test func(t *testing.T, g *guest, processes string)) {
	t.Run("process group", func(t *testing.T) { t.Parallel(); test(t, startGuest(t), "") })
	for _, uid := range []int{0, 65534} {
		t.Run(fmt.Sprintf("cgroup, user %d", uid), func(t *testing.T) {
			t.Parallel()
			g, processes := startGuestInCgroup(t, uid)
			test(t, g, processes)
		})
	}
}

// held is a fifo that processes hold open for writing, so that a read of it ends when they are gone.
type held struct{ path string }

func hold(t testing.TB) held {
	path := fifo(t)
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(path); dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return held{path}
}

// open opens the fifo for reading, when a process opens it for writing, and reads the first line.
func (h held) open(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Open(h.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	line := make([]byte, 6)
	if _, err := io.ReadFull(f, line); err != nil || string(line) != "ready\n" {
		t.Fatalf("read %q: %v", line, err)
	}
	return f
}

// gone waits until no process holds the fifo.
func gone(t testing.TB, f *os.File) {
	t.Helper()
	if rest, err := io.ReadAll(f); err != nil || len(rest) > 0 {
		t.Errorf("read from the fifo: %q, %v", rest, err)
	}
}

// wantHeld checks that a process holds the fifo.
func wantHeld(t testing.TB, f *os.File) {
	t.Helper()
	if err := f.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if n, err := f.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("no process holds the fifo any more: read %d, %v", n, err)
	}
	_ = f.SetReadDeadline(time.Time{})
}

func TestWithCall(t *testing.T) {
	t.Parallel()
	guests(t, func(t *testing.T, g *guest, processes string) {
		c := g.dial(t)
		h := hold(t)
		detach := ""
		if processes != "" {
			detach = "setsid"
		}
		req := shell("trap '' TERM HUP; exec 3>%s; %s sh -c 'echo ready >&3; sleep 600' & echo started; wait", h.path, detach)
		req.WithCall = true
		e := c.start(t, req)
		f := h.open(t)
		e.until(t, "started")
		exit := c.attach(t, &portalv1.AttachProcessRequest{Process: e.selector(), NoOutput: true})
		past := c.attach(t, &portalv1.AttachProcessRequest{Process: e.selector(), Replay: true, NoFollow: true})
		for past.read() {
		}
		if past.err != io.EOF || past.data() != "" {
			t.Errorf("replay of a process without a ring buffer: %v, output %q", past.err, past.data())
		}
		e.cancel()
		gone(t, f)
		if exit := exit.finish(t); exit.GetSignal() != 9 {
			t.Errorf("exit %v, want the signal 9", exit)
		}
		wantEmpty(t, c, processes)
	})
}

// wantEmpty checks that the portal removes the cgroups of processes that have ended. One of those that there are may be for
// the next process.
func wantEmpty(t *testing.T, c *rpc, processes string) {
	t.Helper()
	if processes == "" {
		return
	}
	entries, err := os.ReadDir(processes)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		for e.IsDir() {
			if _, err := os.Stat(filepath.Join(processes, e.Name())); errors.Is(err, fs.ErrNotExist) {
				break
			}
			c.start(t, shell("true")).finish(t)
		}
	}
}

func TestTimeLimit(t *testing.T) {
	t.Parallel()
	guests(t, func(t *testing.T, g *guest, processes string) {
		c := g.dial(t)
		detach := ""
		if processes != "" {
			detach = "setsid"
		}
		for _, tt := range []struct {
			name, script   string
			timeout, grace time.Duration
			code, signal   int32
		}{
			{"ends at SIGTERM", "exec 3>%[1]s; %[2]s sh -c 'sleep 600 & echo ready >&3; wait' & wait", 1000, 600_000, 143, 15},
			{"handles SIGTERM", "exec 3>%[1]s; trap 'exit 7' TERM; %[2]s sh -c 'echo ready >&3; exec sleep 600' & wait", 1000, 600_000, 7, 0},
			{"ignores SIGTERM", "exec 3>%[1]s; trap '' TERM; %[2]s sh -c 'sleep 600; true' & echo ready >&3; wait", 1000, 10, 137, 9},
		} {
			h := hold(t)
			req := shell(tt.script, h.path, detach)
			req.Timeout, req.Grace = durationpb.New(tt.timeout*time.Millisecond), durationpb.New(tt.grace*time.Millisecond)
			e := c.start(t, req)
			f := h.open(t)
			if exit := e.finish(t); !exit.GetTimedOut() || exit.GetExitCode() != tt.code || exit.GetSignal() != tt.signal {
				t.Errorf("%s: exit %v, want the code %d and the signal %d", tt.name, exit, tt.code, tt.signal)
			}
			gone(t, f)
		}
		if processes == "" {
			return
		}

		// The process ends at SIGTERM, but a child ignores it. The exit is reported before the child is killed.
		h := hold(t)
		req := shell("exec 3>%s; (trap '' TERM; setsid sh -c 'echo ready >&3; sleep 600; true') & wait", h.path)
		req.Timeout, req.Grace = durationpb.New(time.Second), durationpb.New(3*time.Second)
		e := c.start(t, req)
		f := h.open(t)
		if exit := e.finish(t); exit.GetSignal() != 15 {
			t.Errorf("exit %v, want the signal 15", exit)
		}
		wantHeld(t, f)
		gone(t, f)
		wantEmpty(t, c, processes)
	})
}

func TestSignals(t *testing.T) {
	t.Parallel()
	guests(t, func(t *testing.T, g *guest, processes string) {
		c := g.dial(t)
		signal := func(e *events, number int32, all bool) error {
			_, err := c.SignalProcess(t.Context(), &portalv1.SignalProcessRequest{Process: e.selector(), Signal: number, All: all})
			return err
		}
		// One signal for the process alone, and one for everything.
		detach := ""
		if processes != "" {
			detach = "setsid"
		}
		h := hold(t)
		e := c.start(t, shell("exec 3>%s; trap 'echo usr1' USR1; trap 'exit 5' USR2; %s sh -c 'echo ready >&3; exec sleep 600' & while :; do wait; done", h.path, detach))
		f := h.open(t)
		for _, number := range []int32{0, 65, -1} {
			wantStatus(t, "signal", signal(e, number, false), codes.InvalidArgument, "use a number from 1 to 64")
		}
		if err := signal(e, int32(syscall.SIGUSR1), false); err != nil {
			t.Fatal(err)
		}
		e.until(t, "usr1\n")
		wantHeld(t, f)
		if err := signal(e, int32(syscall.SIGUSR2), true); err != nil {
			t.Fatal(err)
		}
		gone(t, f)
		if exit := e.finish(t); exit.GetExitCode() != 5 {
			t.Errorf("exit %v, output %q", exit, e.data())
		}

		h = hold(t)
		e = c.start(t, shell("exec 3>%s; %s sh -c 'echo ready >&3; sleep 600; true' & wait", h.path, detach))
		f = h.open(t)
		if err := signal(e, int32(syscall.SIGKILL), true); err != nil {
			t.Fatal(err)
		}
		if exit := e.finish(t); exit.GetSignal() != 9 || exit.GetReason() != "" {
			t.Errorf("exit %v", exit)
		}
		gone(t, f)
		wantEmpty(t, c, processes)
		wantStatus(t, "signal to an ended process", signal(e, 15, true), codes.FailedPrecondition, "has ended")

		if processes == "" {
			return
		}
		// What an ended process has left can get a signal.
		h = hold(t)
		e = c.start(t, shell("exec 3>%s; %s sh -c 'echo ready >&3; sleep 600; true' >/dev/null 2>&1 &", h.path, detach))
		f = h.open(t)
		e.finish(t)
		if err := signal(e, 15, true); err != nil {
			t.Fatal(err)
		}
		gone(t, f)
		wantEmpty(t, c, processes)
	})
}

// TestBackgroundKeepsItsCgroup checks that a process without a time limit leaves its children alone, and that their cgroup
// is removed when they have ended.
func TestBackgroundKeepsItsCgroup(t *testing.T) {
	t.Parallel()
	g, processes := startGuestInCgroup(t, 0)
	c := g.dial(t)
	h, end := hold(t), fifo(t)
	holder, err := os.OpenFile(end, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	const children = 20 // more than the portal tries to remove at a time
	for range children {
		c.start(t, shell("(exec 3>%s <%s; echo ready >&3; cat) & true", h.path, end)).finish(t)
	}
	f := h.open(t)
	if rest, err := io.ReadAll(io.LimitReader(f, (children-1)*int64(len("ready\n")))); err != nil {
		t.Errorf("read %q from the children: %v", rest, err)
	}
	holder.Close()
	gone(t, f)
	wantEmpty(t, c, processes)
}

// TestFilesInPlaceOfCgroups starts a portal whose first descriptors are files of a cgroup: Go's runtime opens some before
// main.
func TestFilesInPlaceOfCgroups(t *testing.T) {
	t.Parallel()
	f, err := os.Open(cgroupRoot(t) + "/cgroup.procs")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	g := newGuest()
	serve := msbPortal(t, "serve", g.socket)
	serve.ExtraFiles = []*os.File{f, f}
	g.start(t, serve)
	e := g.dial(t).start(t, shell("echo works"))
	if e.finish(t); e.data() != "works\n" {
		t.Errorf("output %q", e.data())
	}
}
