package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

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

// release lets a process go on that waits for a line from the fifo. A process that waits more than once must open the fifo only
// once, because it could open it again before release has closed it, and would then read its end.
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

// A user who may not enter the directory of the image starts in the home directory, or in / if that is not possible either.
func TestDirectoryThatTheUserMayNotEnter(t *testing.T) {
	t.Parallel()
	daemon, err := user.Lookup("daemon")
	if err != nil {
		t.Fatal(err)
	}
	closed := t.TempDir()
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(closed+"/secret", []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	g := newGuest()
	serve := msbPortal(t, "serve", g.socket)
	serve.Dir = closed
	g.start(t, serve)
	c := g.dial(t)
	// The test's own python3 may be one that only root can run.
	environment := &portalv1.Environment{Env: []string{"PATH=/usr/bin:/bin"}}
	directories := map[string]string{"": closed, "root": closed, "daemon": daemon.HomeDir, "nobody": "/", "4000": "/"}
	for user, want := range directories {
		e := c.start(t, &portalv1.StartProcessRequest{Argv: []string{"pwd"}, User: user, Environment: environment})
		if exit := e.finish(t); exit.GetExitCode() != 0 || text(e.out) != "stdout: "+want+"\n" {
			t.Errorf("user %q: exit %v, output %q, want %s", user, exit, text(e.out), want)
		}
	}
	listed := c.list(t)
	if len(listed) != len(directories) {
		t.Errorf("%d processes are listed, want %d", len(listed), len(directories))
	}
	for _, info := range listed {
		if want, ok := directories[info.GetUser()]; ok && info.GetCwd() != want {
			t.Errorf("the process of %s is listed in %s, want %s", info.GetUser(), info.GetCwd(), want)
		}
	}
	for language, code := range map[portalv1.RunCodeRequest_Language]string{
		python: "import os; print(os.getcwd())", node: "console.log(process.cwd())", bash: "pwd",
	} {
		created, err := c.portal.CreateContext(t.Context(), &portalv1.CreateContextRequest{Language: language, User: "daemon", Environment: environment})
		if err != nil || created.GetContext().GetCwd() != "" {
			t.Fatalf("%v: created %v, error %v", language, created, err)
		}
		ok, printed, err := c.code(t, &portalv1.RunCodeRequest{Context: created.GetContext().GetName(), Code: code})
		if err != nil || !ok || printed != daemon.HomeDir+"\n" {
			t.Errorf("%v: success %t, %v, output %q, want %s", language, ok, err, printed, daemon.HomeDir)
		}
	}
	for _, program := range []string{closed + "/secret", "./secret"} {
		wantStatus(t, program, c.try(t, &portalv1.StartProcessRequest{Argv: []string{program}, User: "daemon"}).err, codes.PermissionDenied,
			fmt.Sprintf(`%s cannot be run by the user "daemon", who may not use the program %q`, program, closed+"/secret"))
	}
	// A directory that the request or the configuration of the sandbox names is an error.
	for _, req := range []*portalv1.StartProcessRequest{{Cwd: "."}, {Environment: &portalv1.Environment{Workdir: closed}}} {
		req.Argv, req.User = []string{"pwd"}, "daemon"
		wantStatus(t, req.String(), c.try(t, req).err, codes.PermissionDenied, fmt.Sprintf("may not use the program or the working directory %q: choose another cwd", closed))
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
	if err != nil || resp.GetContract() != 6 {
		t.Errorf("ping: %v, %v, want the contract 6", resp, err)
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
