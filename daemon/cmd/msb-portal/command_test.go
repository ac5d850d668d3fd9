package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
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
	script := t.TempDir() + "/script"
	if err := os.WriteFile(script, []byte("#!/nonexistent\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	notFound := func(err error) bool { return errors.Is(err, sandbox.ErrCommandNotFound) }
	for _, tt := range []struct {
		run   sandbox.Command
		class func(error) bool
		want  string
	}{
		{sandbox.Command{Program: strings.Repeat("\x01", 100<<10)}, notFound, `\x01\x01`}, // must not end the connection
		{sandbox.Command{Program: "nope"}, notFound, "nope is not in PATH"},
		{sandbox.Command{Program: "/nope"}, notFound, "/nope: file does not exist"},
		{sandbox.Command{Program: "/etc/passwd"}, notFound, "/etc/passwd: is not executable"},
		{sandbox.Command{Program: "/"}, notFound, "is a directory"},
		{sandbox.Command{Program: script}, notFound, "interpreter"},
		{sandbox.Command{}, errdefs.IsInvalidArgument, "command is empty"},
		{sandbox.Command{Program: "true", Args: []string{"\x00"}}, errdefs.IsInvalidArgument, "NUL"},
		{sandbox.Command{Program: "true", Args: []string{strings.Repeat("x", 1<<20)}}, errdefs.IsInvalidArgument, "too long"},
		{sandbox.Command{Program: "true", Environment: sandbox.Environment{Env: []string{"x"}}}, errdefs.IsInvalidArgument, "NAME=value"},
		{sandbox.Command{Program: "true", Environment: sandbox.Environment{Workdir: "/nonexistent"}}, errdefs.IsInvalidArgument, "does not exist"},
		{sandbox.Command{Program: "true", Environment: sandbox.Environment{Workdir: "/etc/passwd"}}, errdefs.IsInvalidArgument, "not a directory"},
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

	// Cancelling kills the process group. Both shells hold the fifo open, so a read ends only after both have died.
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
