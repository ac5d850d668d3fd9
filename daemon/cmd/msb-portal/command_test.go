package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// sh runs a shell script.
func sh(ctx context.Context, c *connection, script string) (commandResult, error) {
	return c.runCommand(ctx, sandbox.Command{Program: "sh", Args: []string{"-c", script}, Timeout: time.Minute})
}

func TestCommand(t *testing.T) {
	t.Parallel()
	c := startGuest(t, "FROM_IMAGE=1").connect(t)
	dir := t.TempDir()
	for _, tt := range []struct {
		run  sandbox.Command
		code int
		want string
	}{
		{sandbox.Command{Program: "true"}, 0, ""},
		{sandbox.Command{Program: "false"}, 1, ""},
		{sandbox.Command{Program: "echo", Args: []string{"a b", "$HOME", "*"}}, 0, "stdout: a b $HOME *\n"},
		{sandbox.Command{Program: "sh", Args: []string{"-c", "echo out; echo err >&2; exit 42"}}, 42, "stdout: out\nstderr: err\n"},
		{sandbox.Command{Program: "sh", Args: []string{"-c", "kill -9 $$"}}, 137, ""},
		{sandbox.Command{Program: "sh", Args: []string{"-c", "kill -TERM $$"}}, 143, ""},
		{sandbox.Command{Program: "cat"}, 0, ""},
		{sandbox.Command{Program: "pwd", Environment: sandbox.Environment{Workdir: dir}}, 0, "stdout: " + dir + "\n"},
		{sandbox.Command{Program: "sh", Args: []string{"-c", "echo $FROM_IMAGE $ADDED"}, Environment: sandbox.Environment{Env: []string{"ADDED=2"}}}, 0, "stdout: 1 2\n"},
		{sandbox.Command{Program: "sh", Args: []string{"-c", "ls /proc/$$/fd"}}, 0, "stdout: 0\nstdout: 1\nstdout: 2\n"},
	} {
		r, err := c.runCommand(t.Context(), tt.run)
		if err != nil || r.ExitCode != tt.code || text(r.Output) != tt.want {
			t.Errorf("run %v: exit code %d, error %v, output\n%swant %d,\n%s", tt.run, r.ExitCode, err, text(r.Output), tt.code, tt.want)
		}
	}
}

func TestCommandThatCannotBeRun(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	dir := t.TempDir()
	for name, content := range map[string]string{"ruby": "#!/opt/ruby -w\n", "windows": "#!/bin/sh\r\necho\r\n", "data": "\x00"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	notFound := func(err error) bool { return errors.Is(err, sandbox.ErrCommandNotFound) }
	notExecutable := func(err error) bool { return errors.Is(err, sandbox.ErrCommandNotExecutable) }
	for _, tt := range []struct {
		run   sandbox.Command
		class func(error) bool
		want  string
	}{
		{sandbox.Command{Program: strings.Repeat("\x01", 100<<10)}, notFound, `\x01\x01`}, // must not end the connection
		{sandbox.Command{Program: "nope"}, notFound, `program "nope" not found in PATH (`},
		{sandbox.Command{Program: "/nope"}, notFound, `file "/nope" not found`},
		{sandbox.Command{Program: "ls -la /"}, notFound, `use command "ls" with args ["-la", "/"], or command "sh" with args ["-c", "ls -la /"]`},
		{sandbox.Command{Program: "ls | wc"}, notFound, `, not the name of a program; use command "sh" with args ["-c", "ls | wc"]`},
		{sandbox.Command{Program: "ls>x"}, notFound, `, not the name of a program; use command "sh" with args ["-c", "ls>x"]`},
		{sandbox.Command{Program: "FOO=1 env"}, notFound, `, not the name of a program; use command "sh" with args ["-c", "FOO=1 env"]`},
		{sandbox.Command{Program: `ls "my dir"`}, notFound, `, not the name of a program; use command "sh" with args ["-c", "ls \"my dir\""]`},
		{sandbox.Command{Program: "cd /tmp"}, notFound, `, not the name of a program; use command "sh" with args ["-c", "cd /tmp"]`},
		{sandbox.Command{Program: "/bin/ls | grep " + strings.Repeat("x", 100)}, notFound, `put the arguments into args`},
		{sandbox.Command{Program: "cd"}, notFound, `use command "sh" with args ["-c", "cd …"]`},
		{sandbox.Command{Program: "/etc/passwd"}, notExecutable, "/etc/passwd is not executable"},
		{sandbox.Command{Program: "/"}, notExecutable, "is a directory"},
		{sandbox.Command{Program: "passwd", Environment: sandbox.Environment{Env: []string{"PATH=/etc"}}}, notExecutable, "/etc/passwd is not executable"},
		{sandbox.Command{Program: dir + "/data"}, notExecutable, "for another architecture, or a script without a #! line"},
		{sandbox.Command{Program: dir + "/ruby"}, notFound, dir + `/ruby cannot be run: the interpreter "/opt/ruby" of this script was not found in the image`},
		{sandbox.Command{Program: dir + "/windows"}, notFound, "line endings of Windows"},
		{sandbox.Command{}, errdefs.IsInvalidArgument, "command is empty"},
		{sandbox.Command{Program: "true", Args: []string{"\x00"}}, errdefs.IsInvalidArgument, "NUL"},
		{sandbox.Command{Program: "true", Args: []string{strings.Repeat("x", 1<<20)}}, errdefs.IsInvalidArgument, "too long"},
		{sandbox.Command{Program: "true", Environment: sandbox.Environment{Env: []string{"x"}}}, errdefs.IsInvalidArgument, "NAME=value"},
		{sandbox.Command{Program: "true", Environment: sandbox.Environment{Workdir: "/nonexistent"}}, errdefs.IsFailedPrecondition, "does not exist in the sandbox: stop the sandbox and start it with another workdir"},
		{sandbox.Command{Program: "true", Environment: sandbox.Environment{Workdir: "/etc/passwd"}}, errdefs.IsFailedPrecondition, "not a directory"},
		{sandbox.Command{Program: "true", Environment: sandbox.Environment{Workdir: "tmp"}}, errdefs.IsInvalidArgument, "absolute"},
	} {
		if _, err := c.runCommand(t.Context(), tt.run); err == nil || !tt.class(err) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("run %.100v: %v, want an error containing %q", tt.run, err, tt.want)
		}
	}
}

// TestBackgroundChild checks that a command ends when its process exits although a child still has the pipes open, and
// that the child can still print.
func TestBackgroundChild(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	start, alive := fifo(t), fifo(t)
	r, err := sh(t.Context(), c, fmt.Sprintf("(read x <%s; echo lost; echo lost; echo alive >%s) & echo here", start, alive))
	if err != nil || text(r.Output) != "stdout: here\n" {
		t.Fatalf("%v\n%s", err, text(r.Output))
	}
	if err := os.WriteFile(start, []byte("\n"), 0); err != nil {
		t.Fatal(err)
	}
	if got := wait(t, alive); got != "alive\n" {
		t.Errorf("the child wrote %q, want %q", got, "alive\n")
	}
}

func TestCommandLimits(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)

	r, err := c.runCommand(t.Context(), sandbox.Command{Program: "sh", Args: []string{"-c", "sleep 60; true"}, Timeout: 200 * time.Millisecond})
	if !errors.Is(err, sandbox.ErrRunTimeout) || err.Error() != "the run reached its time limit of 200ms and was interrupted" {
		t.Errorf("command over its time limit: %v, %v; want sandbox.ErrRunTimeout", r, err)
	}

	// Canceling kills the process group. Both shells hold the fifo open, so a read ends only after both have died.
	ctx, cancel := context.WithCancel(t.Context())
	started, held := fifo(t), fifo(t)
	ended := make(chan error, 1)
	go func() {
		_, err := sh(ctx, c, fmt.Sprintf("exec 3>%s; sh -c 'echo >%s; sleep 60; true'; true", held, started))
		ended <- err
	}()
	holder, err := os.Open(held)
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	wait(t, started)
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("canceled command: %v, want context.Canceled", err)
	}
	if n, err := holder.Read(make([]byte, 1)); n != 0 {
		t.Errorf("read from the fifo: %d bytes, %v; want 0", n, err)
	}
}

// TestOrphansAreReaped checks that the portal reaps processes that its commands leave behind.
func TestOrphansAreReaped(t *testing.T) {
	t.Parallel()
	g := startGuest(t)
	c := g.connect(t)
	r, err := sh(t.Context(), c, "sh -c 'echo $$; exec >&- 2>&-; sleep 0.05' &")
	if err != nil {
		t.Fatal(err)
	}
	r2, err := sh(t.Context(), c, "sleep 0.01 >/dev/null 2>&1 & echo $!")
	if err != nil || len(r2.Output) != 1 {
		t.Fatalf("%v\n%s", err, text(r2.Output))
	}
	for _, l := range append(r.Output, r2.Output...) {
		pid, err := strconv.Atoi(strings.TrimSpace(string(l.Data)))
		if err != nil {
			t.Fatal(err)
		}
		// If the process stayed a zombie, kill would succeed forever.
		for syscall.Kill(pid, 0) == nil {
			if err := c.Ping(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestStreamsThatEndBeforeTheirProcess runs commands at the same time that close one of their streams early. The portal
// must not use the descriptor of a stream again that it has closed, because it may be that of another command by then.
func TestStreamsThatEndBeforeTheirProcess(t *testing.T) {
	t.Parallel()
	c := startGuest(t).connect(t)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 100 {
				r, err := sh(t.Context(), c, "exec 2>&-; echo a; sleep 0.001 & echo b")
				if err != nil || text(r.Output) != "stdout: a\nstdout: b\n" {
					t.Errorf("error %v, output\n%s", err, text(r.Output))
					return
				}
			}
		})
	}
	all.Wait()
}

// TestBackgroundChildrenUseDescriptors starts commands that leave a child with their pipes in the background, until the
// portal has no more descriptors. Each needs only two, the error says what is exhausted, and commands work again when
// the children have ended.
func TestBackgroundChildrenUseDescriptors(t *testing.T) {
	t.Parallel()
	const limit = 256
	g := newGuest()
	serve := msbPortal(t, "serve", g.socket)
	serve.Args = append([]string{"sh", "-c", fmt.Sprintf("ulimit -n %d; exec \"$@\"", limit), "sh", serve.Path}, serve.Args[1:]...)
	serve.Path = "/bin/sh"
	g.start(t, serve)
	c := g.connect(t)
	held := fifo(t)
	holder, err := os.OpenFile(held, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	background := fmt.Sprintf("cat %s &", held)
	started := 0
	for {
		if _, err = sh(t.Context(), c, background); err != nil {
			break
		}
		started++
	}
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "the sandbox cannot start another process: too many open files") {
		t.Errorf("command without descriptors: %v, want FailedPrecondition", err)
	}
	if most := limit/2 - 20; started < most {
		t.Errorf("%d children in the background exhaust %d descriptors, want at least %d", started, limit, most)
	}
	holder.Close()
	for {
		if _, err := sh(t.Context(), c, "true"); err == nil {
			break
		} else if !errdefs.IsFailedPrecondition(err) {
			t.Fatalf("command after the children have ended: %v", err)
		}
	}
}
