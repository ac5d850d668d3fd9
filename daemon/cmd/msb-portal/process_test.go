package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// rpc is a connection to a guest, as the generated clients use it.
type rpc struct {
	portalv1.ProcessServiceClient
	portal portalv1.PortalServiceClient
	conn   *grpc.ClientConn
}

// bridgeConn is a bridge as a net.Conn without deadlines.
type bridgeConn struct{ *bridge }

func (bridgeConn) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (bridgeConn) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (bridgeConn) SetDeadline(time.Time) error      { return nil }
func (bridgeConn) SetReadDeadline(time.Time) error  { return nil }
func (bridgeConn) SetWriteDeadline(time.Time) error { return nil }

func (g *guest) dial(t testing.TB) *rpc {
	t.Helper()
	b := g.bridge(t)
	conn, err := grpc.NewClient("passthrough:///portal", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return bridgeConn{b}, nil }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c := &rpc{portalv1.NewProcessServiceClient(conn), portalv1.NewPortalServiceClient(conn), conn}
	if _, err := c.portal.Ping(t.Context(), &portalv1.PingRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	return c
}

// events are the events of a StartProcess or AttachProcess call.
type events struct {
	next    func() (*portalv1.ProcessEvent, error)
	cancel  func()
	started *portalv1.ProcessStarted
	// out is the output that was read so far, and exit the exit.
	out  output
	exit *portalv1.ProcessExit
	err  error
}

func follow[T any, P interface {
	*T
	GetEvent() *portalv1.ProcessEvent
}](cancel func(), stream grpc.ServerStreamingClient[T], err error) *events {
	e := &events{cancel: cancel, err: err}
	e.next = func() (*portalv1.ProcessEvent, error) {
		m, err := stream.Recv()
		return P(m).GetEvent(), err
	}
	if e.err == nil {
		var first *portalv1.ProcessEvent
		if first, e.err = e.next(); e.err == nil {
			e.started = first.GetStarted()
		}
	}
	return e
}

func (c *rpc) try(t testing.TB, req *portalv1.StartProcessRequest) *events {
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	stream, err := c.StartProcess(ctx, req)
	return follow(cancel, stream, err)
}

func (c *rpc) tryAttach(t testing.TB, req *portalv1.AttachProcessRequest) *events {
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	stream, err := c.AttachProcess(ctx, req)
	return follow(cancel, stream, err)
}

// start starts a process. The first event must be ProcessStarted.
func (c *rpc) start(t testing.TB, req *portalv1.StartProcessRequest) *events {
	t.Helper()
	e := c.try(t, req)
	if e.err != nil || e.started.GetPid() == 0 || e.started.GetSkippedBytes() != 0 {
		t.Fatalf("start %q: %v, %v", req.GetArgv(), e.started, e.err)
	}
	return e
}

func (c *rpc) attach(t testing.TB, req *portalv1.AttachProcessRequest) *events {
	t.Helper()
	e := c.tryAttach(t, req)
	if e.err != nil || e.started.GetPid() == 0 {
		t.Fatalf("attach to %v: %v, %v", req.GetProcess(), e.started, e.err)
	}
	return e
}

// read reads one event.
func (e *events) read() bool {
	var event *portalv1.ProcessEvent
	if event, e.err = e.next(); e.err != nil {
		return false
	}
	switch event := event.GetEvent().(type) {
	case *portalv1.ProcessEvent_Output:
		names := map[portalv1.Output_Stream]sandbox.Stream{
			portalv1.Output_STREAM_STDOUT: sandbox.Stdout, portalv1.Output_STREAM_STDERR: sandbox.Stderr,
			portalv1.Output_STREAM_TERMINAL: sandbox.Terminal,
		}
		e.out = append(e.out, sandbox.Output{Stream: names[event.Output.GetStream()], Data: event.Output.GetData()})
	case *portalv1.ProcessEvent_Exit:
		e.exit = event.Exit
	default:
		e.err = fmt.Errorf("unexpected event %v", event)
		return false
	}
	if e.exit != nil {
		if _, err := e.next(); err != io.EOF {
			e.err = fmt.Errorf("after the exit: %w, want EOF", err)
		}
		return false
	}
	return true
}

// data returns the output that was read so far.
func (e *events) data() string {
	var b strings.Builder
	for _, o := range e.out {
		b.Write(o.Data)
	}
	return b.String()
}

// until reads until the output contains text.
func (e *events) until(t testing.TB, text string) {
	t.Helper()
	for !strings.Contains(e.data(), text) {
		if !e.read() {
			t.Fatalf("the process ended with %v, error %v, output %q; want %q", e.exit, e.err, e.data(), text)
		}
	}
}

// finish reads until the exit.
func (e *events) finish(t testing.TB) *portalv1.ProcessExit {
	t.Helper()
	for e.read() {
	}
	if e.exit == nil || e.err != nil {
		t.Fatalf("the events ended without an exit: %v", e.err)
	}
	return e.exit
}

func (e *events) selector() *portalv1.ProcessSelector {
	return &portalv1.ProcessSelector{Pid: e.started.GetPid()}
}

func shell(script string, args ...any) *portalv1.StartProcessRequest {
	return &portalv1.StartProcessRequest{Argv: []string{"sh", "-c", fmt.Sprintf(script, args...)}}
}

// release lets a process go on that waits for a line from the fifo.
func release(t testing.TB, fifo string) {
	t.Helper()
	if err := os.WriteFile(fifo, []byte("\n"), 0); err != nil {
		t.Fatal(err)
	}
}

func (c *rpc) write(t testing.TB, reqs ...*portalv1.WriteInputRequest) error {
	t.Helper()
	stream, err := c.WriteInput(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, req := range reqs {
		if err := stream.Send(req); err != nil {
			break // CloseAndRecv returns why
		}
	}
	_, err = stream.CloseAndRecv()
	return err
}

func (c *rpc) list(t testing.TB) []*portalv1.ProcessInfo {
	t.Helper()
	stream, err := c.ListProcesses(t.Context(), &portalv1.ListProcessesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var infos []*portalv1.ProcessInfo
	for {
		resp, err := stream.Recv()
		if err == io.EOF {
			return infos
		}
		if err != nil {
			t.Fatal(err)
		}
		infos = append(infos, resp.GetProcess())
	}
}

func wantStatus(t testing.TB, what string, err error, code codes.Code, text string) {
	t.Helper()
	if s := status.Convert(err); s.Code() != code || !strings.Contains(s.Message(), text) {
		t.Errorf("%s: %v, want %v with %q", what, err, code, text)
	}
}

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

func TestProcess(t *testing.T) {
	t.Parallel()
	c := startGuest(t, "FROM_IMAGE=1", "SHARED=image", "TERM=").dial(t)
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	sandboxEnv := &portalv1.Environment{Env: []string{"SHARED=sandbox", "OWN=sandbox"}, Workdir: dir}
	for _, tt := range []struct {
		req          *portalv1.StartProcessRequest
		code, signal int32
		want         string
	}{
		{shell("echo out; echo err >&2; exit 42"), 42, 0, "stdout: out\nstderr: err\n"},
		{shell("kill -TERM $$"), 143, 15, ""},
		{&portalv1.StartProcessRequest{Argv: []string{"cat"}}, 0, 0, ""}, // /dev/null
		{&portalv1.StartProcessRequest{Argv: []string{"cat"}, Input: []byte("text\n")}, 0, 0, "stdout: text\n"},
		{&portalv1.StartProcessRequest{Argv: []string{"sh", "-c", "echo $FROM_IMAGE $SHARED $OWN; pwd"}, Environment: sandboxEnv, Env: []string{"OWN=process"}}, 0, 0, "stdout: 1 sandbox process\nstdout: " + dir + "\n"},
		{&portalv1.StartProcessRequest{Argv: []string{"pwd"}, Environment: sandboxEnv, Cwd: ".."}, 0, 0, "stdout: " + filepath.Dir(dir) + "\n"},
		{&portalv1.StartProcessRequest{Argv: []string{"pwd"}, Environment: sandboxEnv, Cwd: "/usr"}, 0, 0, "stdout: /usr\n"},
		{&portalv1.StartProcessRequest{Argv: []string{"pwd"}, User: "daemon", Cwd: "~"}, 0, 0, "stdout: /usr/sbin\n"},
		{&portalv1.StartProcessRequest{Argv: []string{"sh", "-c", "id -un; id -gn; id -G; echo $HOME $USER $LOGNAME; echo reopened >/dev/stderr"}, User: "daemon", Env: []string{"USER=x"}, Cwd: "/"}, 0, 0, "stdout: daemon\nstdout: daemon\nstdout: 1\nstdout: /usr/sbin x daemon\nstderr: reopened\n"},
		{&portalv1.StartProcessRequest{Argv: []string{"sh", "-c", "id -u; id -g"}, User: "4000:7", Cwd: "/"}, 0, 0, "stdout: 4000\nstdout: 7\n"},
		{shell("ls /proc/$$/fd"), 0, 0, "stdout: 0\nstdout: 1\nstdout: 2\n"},
	} {
		e := c.start(t, tt.req)
		exit := e.finish(t)
		if exit.GetExitCode() != tt.code || exit.GetSignal() != tt.signal || exit.GetTimedOut() || exit.GetReason() != "" || text(e.out) != tt.want {
			t.Errorf("run %q: exit %v, output\n%swant the code %d, the signal %d,\n%s", tt.req.GetArgv(), exit, text(e.out), tt.code, tt.signal, tt.want)
		}
	}
}

func TestProcessThatCannotStart(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	closed := t.TempDir()
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		req  *portalv1.StartProcessRequest
		code codes.Code
		want string
	}{
		{&portalv1.StartProcessRequest{}, codes.InvalidArgument, "command is empty"},
		{&portalv1.StartProcessRequest{Argv: []string{""}}, codes.InvalidArgument, "command is empty"},
		{&portalv1.StartProcessRequest{Argv: []string{"nope"}}, codes.NotFound, `program "nope" not found in PATH`},
		{&portalv1.StartProcessRequest{Argv: []string{"/etc/passwd"}}, codes.PermissionDenied, "is not executable"},
		{&portalv1.StartProcessRequest{Argv: []string{"true", "\x00"}, Terminal: &portalv1.TerminalSize{}}, codes.InvalidArgument, "NUL"},
		{&portalv1.StartProcessRequest{Argv: []string{"true"}, User: "nope"}, codes.InvalidArgument, `user "nope" does not exist in the sandbox`},
		{&portalv1.StartProcessRequest{Argv: []string{"true"}, Cwd: "/nope"}, codes.InvalidArgument, `cwd "/nope" does not exist in the sandbox`},
		{&portalv1.StartProcessRequest{Argv: []string{"true"}, Environment: &portalv1.Environment{Workdir: "/nope"}}, codes.FailedPrecondition, `workdir "/nope" does not exist`},
		{&portalv1.StartProcessRequest{Argv: []string{"true"}, Env: []string{"x"}}, codes.InvalidArgument, "NAME=value"},
		{&portalv1.StartProcessRequest{Argv: []string{"true"}, Tag: strings.Repeat("x", 2000)}, codes.InvalidArgument, "the tag has 2000 bytes"},
		{&portalv1.StartProcessRequest{Argv: []string{"true"}, User: "daemon", Cwd: closed}, codes.PermissionDenied, fmt.Sprintf(`true cannot be run by the user "daemon", who may not use the program or the working directory %q`, closed)},
		{&portalv1.StartProcessRequest{Argv: []string{"true"}, Terminal: &portalv1.TerminalSize{Rows: 1 << 16}}, codes.InvalidArgument, "is too large"},
	} {
		wantStatus(t, fmt.Sprint(tt.req), c.try(t, tt.req).err, tt.code, tt.want)
	}
	if infos := c.list(t); len(infos) != 0 {
		t.Errorf("processes that could not start are listed: %v", infos)
	}
	unknown := &portalv1.ProcessSelector{Pid: 1 << 30}
	wantStatus(t, "attach", c.tryAttach(t, &portalv1.AttachProcessRequest{Process: unknown}).err, codes.NotFound, "there is no process 1073741824")
	wantStatus(t, "attach to a tag", c.tryAttach(t, &portalv1.AttachProcessRequest{Process: &portalv1.ProcessSelector{Tag: "x"}}).err, codes.NotFound, `with the tag "x"`)
	wantStatus(t, "attach to nothing", c.tryAttach(t, &portalv1.AttachProcessRequest{}).err, codes.InvalidArgument, "either its pid or its tag")
	wantStatus(t, "attach to both", c.tryAttach(t, &portalv1.AttachProcessRequest{Process: &portalv1.ProcessSelector{Pid: 1, Tag: "x"}}).err, codes.InvalidArgument, "either its pid or its tag")
	wantStatus(t, "input", c.write(t, &portalv1.WriteInputRequest{Process: unknown}), codes.NotFound, "there is no process")
	wantStatus(t, "no input", c.write(t), codes.InvalidArgument, "either its pid or its tag")
	_, err := c.SignalProcess(t.Context(), &portalv1.SignalProcessRequest{Process: unknown, Signal: 1})
	wantStatus(t, "signal", err, codes.NotFound, "there is no process")
	_, err = c.ResizeTerminal(t.Context(), &portalv1.ResizeTerminalRequest{Process: unknown})
	wantStatus(t, "resize", err, codes.NotFound, "there is no process")
}

func TestPingSaysTheContract(t *testing.T) {
	t.Parallel()
	resp, err := startGuest(t).dial(t).portal.Ping(t.Context(), &portalv1.PingRequest{})
	if err != nil || resp.GetContract() != 1 {
		t.Errorf("ping: %v, %v, want the contract 1", resp, err)
	}
}

func TestProcessInput(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)

	// The input of the request comes first, although it is larger than a pipe, and messages do not mix.
	req := &portalv1.StartProcessRequest{Argv: []string{"cat"}, Input: bytes.Repeat([]byte("f"), 300_000), OpenInput: true}
	e := c.start(t, req)
	var all sync.WaitGroup
	const message = 20_000
	for i := range 10 {
		all.Go(func() {
			data := bytes.Repeat([]byte{'0' + byte(i)}, message)
			if err := c.write(t, &portalv1.WriteInputRequest{Process: e.selector(), Data: data}, &portalv1.WriteInputRequest{Data: data}); err != nil {
				t.Error(err)
			}
		})
	}
	go func() {
		all.Wait()
		if err := c.write(t, &portalv1.WriteInputRequest{Process: e.selector(), Data: []byte("end"), Close: true}); err != nil {
			t.Error(err)
		}
	}()
	e.finish(t)
	data, ok := strings.CutPrefix(e.data(), string(req.GetInput()))
	data, ended := strings.CutSuffix(data, "end")
	if !ok || !ended || len(data) != 20*message {
		t.Fatalf("the input of the request comes first: %t, the last message comes last: %t, %d bytes between them", ok, ended, len(data))
	}
	for piece := range slices.Chunk([]byte(data), message) {
		if n := bytes.Count(piece, piece[:1]); n != message {
			t.Fatalf("a message of %q is mixed with another one", piece[0])
		}
	}

	id := e.selector()
	wantStatus(t, "ended process", c.write(t, &portalv1.WriteInputRequest{Process: id, Data: []byte("x")}), codes.FailedPrecondition, "has ended")
	_, err := c.SignalProcess(t.Context(), &portalv1.SignalProcessRequest{Process: id, Signal: 15})
	wantStatus(t, "signal to an ended process", err, codes.FailedPrecondition, "has ended")

	held := fifo(t)
	e = c.start(t, shell("read x <%s", held))
	wantStatus(t, "no input", c.write(t, &portalv1.WriteInputRequest{Process: e.selector()}), codes.FailedPrecondition, "has no input")
	release(t, held)
	e.finish(t)

	req = shell("cat; read x <%s", held)
	req.Input = []byte("all\n")
	e = c.start(t, req)
	e.until(t, "all\n")
	wantStatus(t, "input without open_input", c.write(t, &portalv1.WriteInputRequest{Process: e.selector(), Data: []byte("x")}), codes.FailedPrecondition, "was closed")
	release(t, held)
	e.finish(t)

	req = shell("exec <&-; echo closed; read x <%s", held)
	req.OpenInput = true
	e = c.start(t, req)
	e.until(t, "closed")
	wantStatus(t, "input that the process has closed", c.write(t, &portalv1.WriteInputRequest{Process: e.selector(), Data: []byte("x")}), codes.FailedPrecondition, "has closed its input")
	release(t, held)
	e.finish(t)

	req = shell("read line; echo got $line; read x <%s", held)
	req.OpenInput = true
	e = c.start(t, req)
	id = e.selector()
	err = c.write(t, &portalv1.WriteInputRequest{Process: id, Data: []byte("one\n"), Close: true}, &portalv1.WriteInputRequest{Data: []byte("two\n")})
	wantStatus(t, "input after close", err, codes.FailedPrecondition, "was closed")
	e.until(t, "got one")
	release(t, held)
	e.finish(t)

	// A write that waits ends with its context, and with the process.
	req = shell("read line; echo reading; read x <%s", held)
	req.OpenInput = true
	e = c.start(t, req)
	id = e.selector()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := c.WriteInput(ctx)
	if err != nil {
		t.Fatal(err)
	}
	big := append([]byte("\n"), make([]byte, 1<<20)...)
	if err := stream.Send(&portalv1.WriteInputRequest{Process: id, Data: big}); err != nil {
		t.Fatal(err)
	}
	e.until(t, "reading")
	cancel()
	if _, err := stream.CloseAndRecv(); status.Code(err) != codes.Canceled {
		t.Errorf("canceled write: %v", err)
	}
	result := make(chan error, 1)
	go func() { result <- c.write(t, &portalv1.WriteInputRequest{Process: id, Data: big}) }()
	release(t, held)
	e.finish(t)
	wantStatus(t, "write during the end of the process", <-result, codes.FailedPrecondition, "the process has")

	// Here a child in the background still has the input.
	keep := fifo(t)
	req = shell("exec 3<&0; (read x <%s) & read line; echo reading; read x <%s", keep, held)
	req.OpenInput = true
	e = c.start(t, req)
	go func() { result <- c.write(t, &portalv1.WriteInputRequest{Process: e.selector(), Data: big}) }()
	e.until(t, "reading")
	release(t, held)
	e.finish(t)
	wantStatus(t, "write during the end of the process", <-result, codes.FailedPrecondition, "the process has ended")
	release(t, keep)
}

func TestTerminal(t *testing.T) {
	t.Parallel()
	c := startGuest(t, "TERM=").dial(t)
	run := func(argv ...string) *portalv1.StartProcessRequest {
		return &portalv1.StartProcessRequest{Argv: argv, Terminal: &portalv1.TerminalSize{Columns: 101, Rows: 37}}
	}
	e := c.start(t, run("sh", "-c", "tty <&0 && tty <&1 && tty <&2; stty size; echo err >&2; cat /proc/$$/stat | cut -d' ' -f5,6,7; echo $$"))
	exit := e.finish(t)
	lines := strings.Split(e.data(), "\r\n")
	pid := e.started.GetPid()
	if exit.GetExitCode() != 0 || len(lines) != 8 || !strings.HasPrefix(lines[0], "/dev/pts/") || lines[1] != lines[0] || lines[2] != lines[0] ||
		lines[3] != "37 101" || lines[4] != "err" || lines[6] != fmt.Sprint(pid) || !strings.HasPrefix(lines[5], fmt.Sprintf("%d %d ", pid, pid)) || strings.HasSuffix(lines[5], " 0") {
		t.Errorf("exit %v, lines %q", exit, lines)
	}
	for _, o := range e.out {
		if o.Stream != sandbox.Terminal {
			t.Errorf("output has the stream %v", o.Stream)
		}
	}

	for env, want := range map[string]string{"TERM=dumb": "dumb\r\n", "X=": "\r\n"} { // the portal's TERM is empty
		req := run("sh", "-c", "echo $TERM")
		req.Env = []string{env}
		e := c.start(t, req)
		if e.finish(t); e.data() != want {
			t.Errorf("with %s, TERM is %q, want %q", env, e.data(), want)
		}
	}

	// Input and resizing.
	req := run("bash", "-c", `trap 'echo resized $(stty size)' WINCH; echo ready; while :; do read -r line || break; echo "got $line"; done; echo end`)
	req.Input = []byte("first\n")
	e = c.start(t, req)
	id := e.selector()
	e.until(t, "got first")
	if _, err := c.ResizeTerminal(t.Context(), &portalv1.ResizeTerminalRequest{Process: id, Size: &portalv1.TerminalSize{Columns: 20, Rows: 10}}); err != nil {
		t.Fatal(err)
	}
	if err := c.write(t, &portalv1.WriteInputRequest{Process: id, Data: []byte("second\n")}); err != nil {
		t.Fatal(err)
	}
	e.until(t, "got second")
	e.until(t, "resized 10 20")
	_, err := c.ResizeTerminal(t.Context(), &portalv1.ResizeTerminalRequest{Process: id, Size: &portalv1.TerminalSize{Columns: 1 << 16}})
	wantStatus(t, "resize", err, codes.InvalidArgument, "is too large")
	wantStatus(t, "close of a terminal", c.write(t, &portalv1.WriteInputRequest{Process: id, Close: true}), codes.FailedPrecondition, "Ctrl-D (4)")
	if err := c.write(t, &portalv1.WriteInputRequest{Process: id, Data: []byte{4}}); err != nil {
		t.Fatal(err)
	}
	e.until(t, "end\r\n")
	if exit := e.finish(t); exit.GetExitCode() != 0 {
		t.Errorf("after Ctrl-D: %v", exit)
	}
	_, err = c.ResizeTerminal(t.Context(), &portalv1.ResizeTerminalRequest{Process: id, Size: &portalv1.TerminalSize{}})
	wantStatus(t, "resize after the end", err, codes.FailedPrecondition, "has ended")

	// Ctrl-C ends the program in the foreground.
	e = c.start(t, run("sh", "-c", "trap 'echo shell' INT; sh -c 'echo ready; exec cat'; echo after $?"))
	e.until(t, "ready")
	if err := c.write(t, &portalv1.WriteInputRequest{Process: e.selector(), Data: []byte{3}}); err != nil {
		t.Fatal(err)
	}
	if e.finish(t); !strings.HasSuffix(e.data(), "shell\r\nafter 130\r\n") {
		t.Errorf("output after Ctrl-C: %q", e.data())
	}

	// All output arrives, also that of a program that ends at once.
	e = c.start(t, run("seq", "100000"))
	e.finish(t)
	for i, line := range strings.Split(strings.TrimSuffix(e.data(), "\r\n"), "\r\n") {
		if line != fmt.Sprint(i+1) {
			t.Fatalf("line %d is %q", i+1, line)
		}
	}
	if !strings.HasSuffix(e.data(), "\r\n100000\r\n") {
		t.Errorf("the output ends with %q", e.data()[max(0, len(e.data())-20):])
	}

	// A program in the background that keeps the terminal does not keep the process.
	alive, start := fifo(t), fifo(t)
	e = c.start(t, run("sh", "-c", fmt.Sprintf("trap '' HUP; (read x <%s; echo lost; echo alive >%s) & echo here", start, alive)))
	if e.finish(t); e.data() != "here\r\n" {
		t.Errorf("output %q", e.data())
	}
	release(t, start)
	if got := wait(t, alive); got != "alive\n" {
		t.Errorf("the child wrote %q", got)
	}

	e = c.start(t, shell("read x <%s", start))
	_, err = c.ResizeTerminal(t.Context(), &portalv1.ResizeTerminalRequest{Process: e.selector(), Size: &portalv1.TerminalSize{}})
	wantStatus(t, "resize without a terminal", err, codes.FailedPrecondition, "has no terminal")
	release(t, start)
	e.finish(t)
}

// TestTerminalType checks the TERM of a portal whose environment has none.
func TestTerminalType(t *testing.T) {
	t.Parallel()
	g := newGuest()
	serve := msbPortal(t, "serve", g.socket)
	serve.Env = slices.DeleteFunc(serve.Env, func(entry string) bool { return strings.HasPrefix(entry, "TERM=") })
	g.start(t, serve)
	e := g.dial(t).start(t, &portalv1.StartProcessRequest{Argv: []string{"sh", "-c", "echo $TERM"}, Terminal: &portalv1.TerminalSize{}})
	if e.finish(t); e.data() != "xterm-256color\r\n" {
		t.Errorf("TERM is %q", e.data())
	}
}

func TestAttach(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	next := fifo(t)
	req := shell("echo one; read x <%[1]s; echo two >&2; read x <%[1]s; exit 3", next)
	req.Tag = "job"
	first := c.start(t, req)
	first.until(t, "one\n")
	id := first.selector()
	tag := &portalv1.ProcessSelector{Tag: "job"}
	live := c.attach(t, &portalv1.AttachProcessRequest{Process: id})
	replay := c.attach(t, &portalv1.AttachProcessRequest{Process: tag, Replay: true})
	exit := c.attach(t, &portalv1.AttachProcessRequest{Process: tag, NoOutput: true, Replay: true})
	for _, e := range []*events{live, exit} {
		if e.started.GetSkippedBytes() != 4 {
			t.Errorf("a call that begins after %q has %v", "one\n", e.started)
		}
	}
	past := c.attach(t, &portalv1.AttachProcessRequest{Process: id, Replay: true, NoFollow: true})
	for past.read() {
	}
	if past.err != io.EOF || text(past.out) != "stdout: one\n" || past.exit != nil {
		t.Errorf("no_follow while the process runs: %v, exit %v, output\n%s", past.err, past.exit, text(past.out))
	}
	release(t, next)
	for _, e := range []*events{first, live, replay} {
		e.until(t, "two\n")
	}
	release(t, next)
	for what, tt := range map[string]struct {
		*events
		want string
	}{
		"start": {first, "stdout: one\nstderr: two\n"}, "live": {live, "stderr: two\n"},
		"replay": {replay, "stdout: one\nstderr: two\n"}, "exit": {exit, ""},
	} {
		if exit := tt.finish(t); exit.GetExitCode() != 3 || text(tt.out) != tt.want {
			t.Errorf("%s: exit %v, output\n%swant\n%s", what, exit, text(tt.out), tt.want)
		}
	}

	// The ended process.
	for _, tt := range []struct {
		req  *portalv1.AttachProcessRequest
		want string
	}{
		{&portalv1.AttachProcessRequest{Process: id}, ""},
		{&portalv1.AttachProcessRequest{Process: tag, Replay: true}, "stdout: one\nstderr: two\n"},
		{&portalv1.AttachProcessRequest{Process: tag, Replay: true, NoFollow: true}, "stdout: one\nstderr: two\n"},
		{&portalv1.AttachProcessRequest{Process: tag, Replay: true, NoOutput: true}, ""},
	} {
		e := c.attach(t, tt.req)
		if exit := e.finish(t); exit.GetExitCode() != 3 || text(e.out) != tt.want {
			t.Errorf("%v: exit %v, output\n%s", tt.req, exit, text(e.out))
		}
		if want := uint64(8 - len(e.data())); e.started.GetSkippedBytes() != want {
			t.Errorf("%v: %d bytes skipped, want %d", tt.req, e.started.GetSkippedBytes(), want)
		}
	}

	// A tag stands for the newest process.
	req = shell("exit 4")
	req.Tag = "job"
	c.start(t, req).finish(t)
	if exit := c.attach(t, &portalv1.AttachProcessRequest{Process: tag}).finish(t); exit.GetExitCode() != 4 {
		t.Errorf("the newest process with the tag: %v", exit)
	}
}

// TestReplayUnderLoad attaches calls at many moments while a process prints 10 MB. What each of them gets, after what was
// skipped, is the rest of the output.
func TestReplayUnderLoad(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	begin := fifo(t)
	// Change the stream sometimes, but wait for the readers of the pipes, so that the order is known.
	e := c.start(t, shell("read x <%s; seq 1000000 1700000; seq 1700001 2250000", begin))
	var want bytes.Buffer
	for i := 1000000; i <= 2250000; i++ {
		want.WriteString(strconv.Itoa(i) + "\n")
	}
	release(t, begin)
	var all sync.WaitGroup
	check := func(what string, e *events) {
		if exit := e.finish(t); exit.GetExitCode() != 0 {
			t.Errorf("%s: %v", what, exit)
		}
		if data := e.data(); e.started.GetSkippedBytes() > uint64(want.Len()) || data != want.String()[e.started.GetSkippedBytes():] {
			t.Errorf("%s: after %d bytes, %d bytes follow that are not the rest", what, e.started.GetSkippedBytes(), len(data))
		}
	}
	for i := range 20 {
		for len(e.data()) < want.Len()/20*i && e.read() {
		}
		for _, replay := range []bool{true, false} {
			e := c.attach(t, &portalv1.AttachProcessRequest{Process: e.selector(), Replay: replay})
			all.Go(func() { check(fmt.Sprintf("call %d, replay %t", i, replay), e) })
		}
	}
	check("start", e)
	all.Wait()
}

// TestBackpressure checks that a process waits for a call that does not read, and goes on when that call is gone.
func TestBackpressure(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	const size = 32 << 20
	script := fmt.Sprintf("head -c %d /dev/zero", size)
	slow := c.start(t, shell("%s", script))
	exit := c.attach(t, &portalv1.AttachProcessRequest{Process: slow.selector(), NoOutput: true})
	// While slow is not read, another call gets only what the buffers of slow have room for.
	other := c.attach(t, &portalv1.AttachProcessRequest{Process: slow.selector(), Replay: true})
	if !other.read() {
		t.Fatal(other.err)
	}
	if printed := c.list(t)[0].GetOutputBytes(); printed > size/2 {
		t.Errorf("the process has printed %d bytes although a call does not read", printed)
	}
	other.cancel()
	if slow.finish(t); len(slow.data()) != size {
		t.Errorf("the slow call got %d bytes, want %d", len(slow.data()), size)
	}
	exit.finish(t)

	// The process waits for two calls. One is canceled, and the connection of the other one ends.
	next := fifo(t)
	stuck := c.start(t, shell("read x <%s; %s", next, script))
	second := c.attach(t, &portalv1.AttachProcessRequest{Process: stuck.selector()})
	exit = c.attach(t, &portalv1.AttachProcessRequest{Process: stuck.selector(), NoOutput: true})
	release(t, next)
	stuck.read()
	second.read()
	stuck.cancel()
	second.cancel()
	exit.finish(t)
}

// TestRing lets a process print without a call that reads it.
// The log of a program that has ended is complete, also while another reader keeps its last output from being read.
func TestLogOfAnEndedProcess(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	const size = 1 << 20
	slow := c.start(t, &portalv1.StartProcessRequest{Argv: []string{"head", "-c", strconv.Itoa(size), "/dev/zero"}, Tag: "x"})
	process := &portalv1.ProcessSelector{Tag: "x"}
	// It ends when the pipe has the last of its output, which slow does not read yet.
	for len(slow.data()) < size-64<<10 {
		slow.read()
	}
	if e := c.attach(t, &portalv1.AttachProcessRequest{Process: process, NoOutput: true}); e.read() || e.exit == nil {
		t.Fatalf("the process has not ended: %v", e.err)
	}
	log := c.attach(t, &portalv1.AttachProcessRequest{Process: process, Replay: true, NoFollow: true})
	slow.cancel()
	for log.read() {
	}
	if got := log.started.GetSkippedBytes() + uint64(len(log.data())); log.exit == nil || got != size {
		t.Errorf("the log ends after %d bytes, with exit %v, error %v; want %d and the exit", got, log.exit, log.err, size)
	}
}

// Runs are forgotten once they have ended, so that however many there are, the other processes are remembered.
func TestRunsAreForgotten(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	run := func(req *portalv1.StartProcessRequest) {
		t.Helper()
		e := c.start(t, req)
		for e.read() {
		}
		if e.exit == nil {
			t.Fatal(e.err)
		}
	}
	run(&portalv1.StartProcessRequest{Argv: []string{"echo", "done"}, Tag: "job"})
	for range 70 {
		run(&portalv1.StartProcessRequest{Argv: []string{"true"}, WithCall: true})
	}
	e := c.attach(t, &portalv1.AttachProcessRequest{Process: &portalv1.ProcessSelector{Tag: "job"}, Replay: true})
	for e.read() {
	}
	if e.exit == nil || e.data() != "done\n" {
		t.Errorf("the job printed %q, error %v", e.data(), e.err)
	}
}

func TestRing(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	begin, printed := fifo(t), fifo(t)
	e := c.start(t, shell("read x <%s; seq 1000000 1400000; echo >%s; read x <%[1]s; echo end", begin, printed))
	e.cancel()
	for e.read() {
	}
	release(t, begin)
	wait(t, printed)
	replay := c.attach(t, &portalv1.AttachProcessRequest{Process: e.selector(), Replay: true})
	const total = 400001 * 8
	if skipped := replay.started.GetSkippedBytes(); skipped > total-(1<<20) || skipped < total-(1<<20)-(64<<10) {
		t.Errorf("%d bytes are skipped, want %d", skipped, total-1<<20)
	}
	release(t, begin)
	replay.finish(t)
	at := int(replay.started.GetSkippedBytes())
	var want strings.Builder
	for i := 1000000; i <= 1400000; i++ {
		want.WriteString(strconv.Itoa(i) + "\n")
	}
	if replay.data() != want.String()[at:]+"end\n" {
		t.Errorf("the replay is not the end of the output")
	}
	infos := c.list(t)
	if n := infos[0].GetOutputBytes(); n != total+4 {
		t.Errorf("output_bytes is %d, want %d", n, total+4)
	}
	again := c.attach(t, &portalv1.AttachProcessRequest{Process: e.selector(), Replay: true})
	if again.finish(t); len(again.data()) != 1<<20 || again.started.GetSkippedBytes() != total+4-1<<20 {
		t.Errorf("the ring has %d bytes after %v, want 1 MiB", len(again.data()), again.started)
	}
}

func TestProcessSurvivesItsClient(t *testing.T) {
	t.Parallel()
	g := startGuest(t)
	c := g.dial(t)
	next := fifo(t)
	req := shell("echo before; read line; echo got $line; read x <%s; echo after", next)
	req.OpenInput, req.Tag = true, "survivor"
	e := c.start(t, req)
	e.until(t, "before")
	withCall := shell("echo started; sleep 600")
	withCall.WithCall = true
	doomed := c.start(t, withCall)
	doomed.until(t, "started")
	c.conn.Close()
	for e.read() {
	}

	c = g.dial(t)
	id := &portalv1.ProcessSelector{Tag: "survivor"}
	if err := c.write(t, &portalv1.WriteInputRequest{Process: id, Data: []byte("hello\n")}); err != nil {
		t.Fatal(err)
	}
	again := c.attach(t, &portalv1.AttachProcessRequest{Process: id, Replay: true})
	again.until(t, "got hello")
	release(t, next)
	if again.finish(t); again.data() != "before\ngot hello\nafter\n" {
		t.Errorf("output after the client was replaced: %q", again.data())
	}
	for syscall.Kill(int(doomed.started.GetPid()), 0) == nil { // it gets a signal when its client is gone
		if _, err := c.portal.Ping(t.Context(), &portalv1.PingRequest{}); err != nil {
			t.Fatal(err)
		}
	}
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

// wantEmpty checks that the portal removes the cgroups of processes that have ended.
func wantEmpty(t *testing.T, c *rpc, processes string) {
	t.Helper()
	if processes == "" {
		return
	}
	for {
		c.start(t, shell("true")).finish(t)
		entries, err := os.ReadDir(processes)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(entries, os.DirEntry.IsDir) {
			return
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
		wantStatus(t, "signal to an ended process", signal(e, 15, true), codes.FailedPrecondition, "has ended")
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

func TestProcessLimits(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	var running []*events
	for range 64 {
		running = append(running, c.start(t, &portalv1.StartProcessRequest{Argv: []string{"cat"}, OpenInput: true}))
	}
	wantStatus(t, "process 65", c.try(t, shell("true")).err, codes.ResourceExhausted, "64 processes run in the sandbox, which is the most that can: end one of them")
	withCall := shell("true")
	withCall.WithCall = true
	e := c.start(t, withCall)
	e.finish(t)
	if infos := c.list(t); len(infos) != 64 || infos[0].GetPid() != running[0].started.GetPid() || infos[0].GetExit() != nil {
		t.Errorf("%d processes are listed, want 64 in the order of their start", len(infos))
	}
	for _, e := range running {
		if err := c.write(t, &portalv1.WriteInputRequest{Process: e.selector(), Close: true}); err != nil {
			t.Error(err)
		}
		e.finish(t)
	}
	c.start(t, shell("true")).finish(t)
	// A process with with_call is not remembered, and of the 65 others, only 64 are.
	for _, e := range []*events{e, running[0]} {
		wantStatus(t, "attach to a forgotten process", c.tryAttach(t, &portalv1.AttachProcessRequest{Process: e.selector()}).err, codes.NotFound, "there is no process")
	}
	if infos := c.list(t); len(infos) != 64 {
		t.Errorf("%d processes are remembered, want 64", len(infos))
	}
}

func TestListProcesses(t *testing.T) {
	t.Parallel()
	c := startGuest(t).dial(t)
	long := strings.Repeat("ä", 20_000)
	before := time.Now()
	c.start(t, &portalv1.StartProcessRequest{Argv: []string{"echo", long, "x"}, Env: []string{"A=1", "B=" + long}, User: "daemon", Cwd: "/", Tag: "t"}).finish(t)
	c.start(t, &portalv1.StartProcessRequest{Argv: []string{"sh", "-c", "exit 3"}, Terminal: &portalv1.TerminalSize{}, Environment: &portalv1.Environment{Workdir: "/usr"}}).finish(t)
	run := c.start(t, &portalv1.StartProcessRequest{Argv: []string{"cat"}, OpenInput: true, WithCall: true})
	infos := c.list(t)
	if len(infos) != 3 || !infos[2].GetWithCall() || infos[2].GetExit() != nil {
		t.Fatalf("got %d processes, want 3, the last of which runs with its call", len(infos))
	}
	first, second := infos[0], infos[1]
	if err := c.write(t, &portalv1.WriteInputRequest{Process: run.selector(), Close: true}); err != nil {
		t.Error(err)
	}
	run.finish(t)
	if infos := c.list(t); len(infos) != 2 {
		t.Errorf("%d processes, want 2 after the run has ended", len(infos))
	}
	if len(first.GetArgv()) != 2 || first.GetArgv()[0] != "echo" || !strings.HasPrefix(long, first.GetArgv()[1]) || len(strings.Join(first.GetArgv(), "")) < 16<<10-4 || len(strings.Join(first.GetArgv(), "")) > 16<<10 {
		t.Errorf("argv has %d entries, %d bytes", len(first.GetArgv()), len(strings.Join(first.GetArgv(), "")))
	}
	if len(first.GetEnv()) != 2 || first.GetEnv()[0] != "A=1" || len(first.GetEnv()[1]) > 16<<10 {
		t.Errorf("env has %d entries", len(first.GetEnv()))
	}
	if started := first.GetStartedAt().AsTime(); started.Before(before) || started.After(time.Now()) {
		t.Errorf("started_at is %v", started)
	}
	if first.GetUser() != "daemon" || first.GetCwd() != "/" || first.GetTag() != "t" || first.GetWithCall() || first.GetTerminal() ||
		first.GetOutputBytes() != uint64(len(long)+3) || first.GetExit() == nil {
		t.Errorf("the first process: user %q, cwd %q, tag %q, with_call %t, terminal %t, output_bytes %d, exit %v", first.GetUser(),
			first.GetCwd(), first.GetTag(), first.GetWithCall(), first.GetTerminal(), first.GetOutputBytes(), first.GetExit())
	}
	if second.GetCwd() != "/usr" || second.GetUser() != "root" || !second.GetTerminal() || second.GetWithCall() || second.GetExit().GetExitCode() != 3 || second.GetPid() == 0 {
		t.Errorf("the second process: %v", second)
	}
}
