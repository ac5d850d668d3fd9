package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/guest/portalclient"
)

// TestReconnect checks that a new connection ends the previous one, and that the REPL keeps its state.
func TestReconnect(t *testing.T) {
	t.Parallel()
	onRoutes(t, func(t *testing.T, start func(t testing.TB, env ...string) *guest) {
		g := start(t)
		old := g.stream(t, "")
		client, err := portalclient.New(t.Context(), old, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		first := &connection{client}
		runCode(t, first, sandbox.Python, "x = 1")

		// Start a run that the end of its connection has to interrupt.
		started := fifo(t)
		ended := make(chan error, 1)
		go func() {
			_, err := first.runCode(t.Context(), sandbox.Code{
				Language: sandbox.Python, Text: fmt.Sprintf("open(%q, 'w').close()\nwhile True: pass", started),
			})
			ended <- err
		}()
		wait(t, started)

		second := g.connect(t)
		if b, ok := old.(*bridge); ok {
			<-b.ended
		}
		if err := <-ended; !errors.Is(err, sandbox.ErrRunFailed) {
			t.Errorf("run on the old connection: %v, want sandbox.ErrRunFailed", err)
		}
		expect(t, second, sandbox.Python, "x", true, "stdout: 1\n")
		if err := first.Ping(t.Context()); !errdefs.IsUnavailable(err) {
			t.Errorf("ping on the old connection: %v, want errdefs.ErrUnavailable", err)
		}
	})
}

// TestAgentSocketStaysInThePortal checks what a portal that gets its connections from the agent leaves to the programs that it
// starts: neither the agent's socket, nor a connection, nor a socket at which the portal listens.
func TestAgentSocketStaysInThePortal(t *testing.T) {
	t.Parallel()
	c := startGuestOverTCP(t).connect(t)
	r, err := sh(t.Context(), c, `for fd in /proc/self/fd/*; do readlink $fd; done | grep -c socket; grep -c "@msb-portal$" /proc/net/unix`)
	if want := "stdout: 0\nstdout: 0\n"; err != nil || text(r.Output) != want {
		t.Errorf("%v, output\n%s, want\n%s", err, text(r.Output), want)
	}
	expect(t, c, sandbox.Python, "import os; print([l for l in (os.readlink(f'/proc/self/fd/{fd}') for fd in range(3)) if 'socket' in l])", true, "stdout: []\n")
}

// dialPortal connects to the portal and prints how many bytes arrive before the connection ends, at most 1. The portal
// sends something as soon as it accepts a connection.
const dialPortal = `import socket
s = socket.socket(socket.AF_UNIX)
s.connect("\0" + %q)
print(len(s.recv(1)))
`

// TestOnlyBridgesConnect connects to the portal as processes of the sandbox do, and as another user. They are refused,
// and do not disturb a run.
func TestOnlyBridgesConnect(t *testing.T) {
	t.Parallel()
	g := startGuest(t)
	c := g.connect(t)
	dial := fmt.Sprintf(dialPortal, strings.TrimPrefix(g.socket, "@"))
	started, end := fifo(t), fifo(t)
	ended := make(chan error, 1)
	go func() {
		_, err := sh(t.Context(), c, fmt.Sprintf("echo >%s; read x <%s", started, end))
		ended <- err
	}()
	wait(t, started)

	expect(t, c, sandbox.Python, dial, true, "stdout: 0\n")
	// The child's parent exits, so the child becomes an orphan.
	answer := fifo(t)
	if _, err := sh(t.Context(), c, fmt.Sprintf("(python3 -c '%s' >%s &)", dial, answer)); err != nil {
		t.Fatal(err)
	}
	if got := wait(t, answer); got != "0\n" {
		t.Errorf("an orphan got %q bytes from the portal, want 0", got)
	}
	// The portal's own program is no proof that msbd has started it.
	r, err := c.runCommand(t.Context(), sandbox.Command{
		Program: msbPortal(t).Path, Args: []string{"connect", g.socket}, Environment: sandbox.Environment{Env: []string{mainEnv + "=1"}},
	})
	if err != nil || strings.Contains(text(r.Output), "stdout") {
		t.Errorf("msb-portal connect in the sandbox: %v, output\n%s", err, text(r.Output))
	}
	if os.Getuid() == 0 {
		if n, err := readAs(65534, g.socket); n != 0 || err != nil {
			t.Errorf("another user got %d bytes from the portal, %v; want 0", n, err)
		}
	}

	if err := os.WriteFile(end, []byte("\n"), 0); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("run during the connections: %v", err)
	}
}

// TestPortalThatIsNotRoot connects to a portal that runs as the user of its image. The bridge is root.
func TestPortalThatIsNotRoot(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can start a process of another user")
	}
	g := newGuest()
	serve := msbPortal(t, "serve", g.socket)
	serve.Path = "/proc/self/exe" // the user may not enter the directory of the test's program
	serve.Dir = "/"
	serve.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	g.start(t, serve)
	r, err := sh(t.Context(), g.connect(t), "id -u")
	if err != nil || text(r.Output) != "stdout: 65534\n" {
		t.Errorf("id -u: %v, output\n%s", err, text(r.Output))
	}
}

// readAs connects to a socket as the user uid and reads a byte.
func readAs(uid int, socket string) (n int, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread has another user, so it must end
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			err = errno
			return
		}
		var fd int
		if fd, err = syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0); err != nil {
			return
		}
		defer syscall.Close(fd)
		if err = syscall.Connect(fd, &syscall.SockaddrUnix{Name: socket}); err == nil {
			n, err = syscall.Read(fd, make([]byte, 1))
		}
	}()
	<-done
	return n, err
}

func TestBridgeEndsWithItsClient(t *testing.T) {
	t.Parallel()
	b := startGuest(t).bridge(t)
	c, err := portalclient.New(t.Context(), b, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	<-b.ended
	if err := c.Ping(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("ping after Close: %v, want errdefs.ErrUnavailable", err)
	}
}

// TestKilledBridge checks that the end of a bridge ends its connection, although the portal has the pipes of the bridge.
func TestKilledBridge(t *testing.T) {
	t.Parallel()
	g := startGuest(t)
	b := g.bridge(t)
	client, err := portalclient.New(t.Context(), b, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	c := &connection{client}
	running := fifo(t)
	ended := make(chan error, 1)
	go func() {
		_, err := sh(t.Context(), c, fmt.Sprintf("echo >%s; exec sleep 6042", running))
		ended <- err
	}()
	wait(t, running)
	if err := b.process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, sandbox.ErrRunFailed) {
		t.Errorf("run over a bridge that was killed: %v, want sandbox.ErrRunFailed", err)
	}
	gone := "while pgrep -f '[s]leep 6042' >/dev/null; do sleep 0.01; done"
	if r, err := sh(t.Context(), g.connect(t), gone); err != nil || r.ExitCode != 0 {
		t.Errorf("wait for the end of the program: %v, %v", r, err)
	}
}

// TestConnectWaitsForTheServer starts `msb-portal connect` before `msb-portal serve`.
func TestConnectWaitsForTheServer(t *testing.T) {
	t.Parallel()
	g := newGuest()
	b := g.bridge(t)
	connected := make(chan error, 1)
	go func() {
		c, err := portalclient.New(t.Context(), b, nil)
		if err == nil {
			c.Close()
		}
		connected <- err
	}()
	g.serve(t)
	if err := <-connected; err != nil {
		t.Error(err)
	}
}

func TestNewIsBoundedByItsContext(t *testing.T) {
	t.Parallel()
	b := newGuest().bridge(t)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := portalclient.New(ctx, b, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("New without a server: %v, want context.DeadlineExceeded", err)
	}
}

func BenchmarkPing(b *testing.B) {
	c := startGuest(b).connect(b)
	for b.Loop() {
		if err := c.Ping(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRunCode(b *testing.B) {
	for _, language := range []sandbox.Language{sandbox.Python, sandbox.Node} {
		b.Run(string(language), func(b *testing.B) {
			c := startGuest(b).connect(b)
			runCode(b, c, language, "1+1")
			for b.Loop() {
				runCode(b, c, language, "1+1")
			}
		})
	}
}

func BenchmarkRunCommand(b *testing.B) {
	c := startGuest(b).connect(b)
	for b.Loop() {
		if _, err := c.runCommand(b.Context(), sandbox.Command{Program: "true"}); err != nil {
			b.Fatal(err)
		}
	}
}
