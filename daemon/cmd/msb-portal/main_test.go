package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
	"github.com/msbd/msbd/daemon/internal/guest/portalclient"
)

// mainEnv is the environment variable that makes the test binary run msb-portal's main instead of the tests.
const mainEnv = "MSB_PORTAL_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(mainEnv) != "" {
		os.Unsetenv(mainEnv)
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

// msbPortal returns a command that runs msb-portal.
func msbPortal(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), mainEnv+"=1")
	cmd.Stderr = os.Stderr
	return cmd
}

var sockets atomic.Int64

// guest is a process `msb-portal serve`, which serve starts.
type guest struct {
	socket string
	// agent is the agent's end of the socket over which the portal gets its connections. If it is nil, they come over bridges.
	agent *net.UnixConn
}

func newGuest() *guest {
	return &guest{socket: fmt.Sprintf("@msb-portal-test-%d-%d", os.Getpid(), sockets.Add(1))}
}

// onRoutes runs a test with guests that msbd reaches over bridges, and with guests that it reaches over TCP. start is
// startGuest or startGuestOverTCP.
func onRoutes(t *testing.T, test func(t *testing.T, start func(t testing.TB, env ...string) *guest)) {
	t.Run("bridges", func(t *testing.T) { t.Parallel(); test(t, startGuest) })
	t.Run("TCP", func(t *testing.T) { t.Parallel(); test(t, startGuestOverTCP) })
}

// startGuestOverTCP is like startGuest, but the test hands over the connections as the agent does. It waits until the portal
// takes them.
func startGuestOverTCP(t testing.TB, env ...string) *guest {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "agent"), os.NewFile(uintptr(fds[1]), "agent")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	g := &guest{agent: conn.(*net.UnixConn)}
	cmd := msbPortal(t, "serve")
	cmd.Env = append(cmd.Env, env...)
	cmd.ExtraFiles = []*os.File{nil, nil, theirs} // 3 and 4 are the cgroups, which this guest does not have
	g.start(t, cmd)
	theirs.Close()
	if n, err := conn.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Fatalf("the portal sends %d bytes, %v; want one when it takes connections", n, err)
	}
	return g
}

// dialTCP makes a TCP connection and hands its other end over to the portal.
func (g *guest) dialTCP(t testing.TB, transfer string) *net.TCPConn {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	host, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	file, err := conn.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, _, err := g.agent.WriteMsgUnix([]byte("\x00"+transfer), unix.UnixRights(int(file.Fd())), nil); err != nil {
		t.Fatal(err)
	}
	return host.(*net.TCPConn)
}

// stream returns a stream to the portal, as msbd opens it.
func (g *guest) stream(t testing.TB, transfer string) io.ReadWriteCloser {
	t.Helper()
	switch {
	case g.agent != nil:
		return g.dialTCP(t, transfer)
	case transfer != "":
		return startBridge(t, "transfer", transfer, g.socket)
	}
	return g.bridge(t)
}

// startGuest starts `msb-portal serve` as a sandbox does. env is added to the test's environment.
func startGuest(t testing.TB, env ...string) *guest {
	t.Helper()
	g := newGuest()
	g.serve(t, env...)
	return g
}

func (g *guest) serve(t testing.TB, env ...string) {
	t.Helper()
	cmd := msbPortal(t, "serve", g.socket)
	cmd.Env = append(cmd.Env, env...)
	g.start(t, cmd)
}

// start starts the command `msb-portal serve`, and stops it after the test.
func (g *guest) start(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("msb-portal serve after SIGTERM: %v", err)
		}
	})
}

// bridge is a running `msb-portal connect` or `msb-portal transfer`.
type bridge struct {
	io.Reader
	io.WriteCloser
	process *os.Process
	// ended is closed when the process has exited.
	ended chan struct{}
}

func (g *guest) bridge(t testing.TB) *bridge {
	t.Helper()
	return startBridge(t, "connect", g.socket)
}

// attach returns a function that opens a stream for a transfer.
func (g *guest) attach(t testing.TB) sandbox.Attach {
	return func(_ context.Context, transfer string) (io.ReadWriteCloser, error) {
		return g.stream(t, transfer), nil
	}
}

func startBridge(t testing.TB, args ...string) *bridge {
	t.Helper()
	cmd := msbPortal(t, args...)
	// Wait would close the pipes that cmd creates, while the portal still uses them.
	inEnd, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, outEnd, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin, cmd.Stdout = inEnd, outEnd
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	inEnd.Close()
	outEnd.Close()
	b := &bridge{Reader: out, WriteCloser: in, process: cmd.Process, ended: make(chan struct{})}
	go func() { _ = cmd.Wait(); close(b.ended) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-b.ended
		in.Close()
		out.Close()
	})
	return b
}

// connection is a client of a guest with methods that run code or a command and wait for its result.
type connection struct{ *portalclient.Client }

// connect connects to the guest.
func (g *guest) connect(t testing.TB) *connection {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := portalclient.New(ctx, g.stream(t, ""), g.attach(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &connection{c}
}

// TestContract runs the contract of sandbox.Portal, which also holds the fakes of other tests, against the real portal.
func TestContract(t *testing.T) {
	onRoutes(t, func(t *testing.T, start func(t testing.TB, env ...string) *guest) {
		sandboxtest.TestPortal(t, func(t *testing.T) sandbox.Portal { return start(t).connect(t) })
	})
}

// output is what a run printed, in the pieces in which it arrived.
type output []sandbox.Output

type codeResult struct {
	Success bool
	Output  output
}

type commandResult struct {
	ExitCode int
	Output   output
}

func (c *connection) runCode(ctx context.Context, code sandbox.Code) (codeResult, error) {
	out, exit, err := collect(c.RunCode(ctx, code))
	return codeResult{exit == 0, out}, err
}

func (c *connection) runCommand(ctx context.Context, command sandbox.Command) (commandResult, error) {
	out, exit, err := collect(c.RunCommand(ctx, command))
	return commandResult{exit, out}, err
}

// collect reads the events of a process until it ends.
func collect(p sandbox.Process, err error) (out output, exit int, _ error) {
	if err != nil {
		return nil, 0, err
	}
	defer p.Close()
	for {
		event, err := p.Next()
		switch event := event.(type) {
		case sandbox.Output:
			out = append(out, event)
		case sandbox.Exit:
			return out, event.Code, nil
		case nil:
			return out, 0, err
		}
	}
}

// text formats output as lines "stream: text".
func text(out output) string {
	names := []sandbox.Stream{sandbox.Stdout, sandbox.Stderr, sandbox.Terminal}
	streams := make([]strings.Builder, len(names))
	var all strings.Builder
	for _, o := range out {
		i := slices.Index(names, o.Stream)
		for piece := range strings.Lines(string(o.Data)) {
			streams[i].WriteString(piece)
			if strings.HasSuffix(piece, "\n") {
				all.WriteString(string(o.Stream) + ": " + streams[i].String())
				streams[i].Reset()
			}
		}
	}
	for i, name := range names {
		if streams[i].Len() > 0 {
			all.WriteString(string(name) + ": " + streams[i].String() + "\n")
		}
	}
	return all.String()
}
