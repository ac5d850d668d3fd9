package sandboxtest

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// TestPortal checks the contract of sandbox.Portal and of its processes. open returns a connection to a new sandbox that has
// Python.
func TestPortal(t *testing.T, open func(t *testing.T) sandbox.Portal) {
	command := func(args ...string) sandbox.Command {
		return sandbox.Command{Program: args[0], Args: args[1:], Timeout: time.Minute}
	}
	python := func(text string) sandbox.Code {
		return sandbox.Code{Language: sandbox.Python, Text: text, Timeout: time.Minute}
	}
	t.Run("exit codes and output", func(t *testing.T) {
		p := open(t)
		if err := p.Ping(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			run  sandbox.Command
			want Result
		}{
			{command("true"), Result{}},
			{command("false"), Result{ExitCode: 1}},
			{command("echo", "a b", "c"), Result{Stdout: "a b c\n"}},
			{command("sh", "-c", "echo out; echo err >&2; exit 42"), Result{ExitCode: 42, Stdout: "out\n", Stderr: "err\n"}},
		} {
			got, err := Read(p.RunCommand(t.Context(), c.run))
			if err != nil || got != c.want {
				t.Errorf("%s %q: got %+v, error %v, want %+v", c.run.Program, c.run.Args, got, err, c.want)
			}
		}
	})
	t.Run("the exit is the last event", func(t *testing.T) {
		process, err := open(t).RunCommand(t.Context(), command("echo", "x"))
		if err != nil {
			t.Fatal(err)
		}
		defer process.Close()
		var last sandbox.Event
		for {
			event, err := process.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, ended := last.(sandbox.Exit); ended {
				t.Errorf("got event %v after the exit", event)
			}
			last = event
		}
		if last != (sandbox.Exit{}) {
			t.Errorf("the last event is %v, want an exit with code 0", last)
		}
		if _, err := process.Next(); err != io.EOF {
			t.Errorf("Next after EOF: got error %v, want EOF", err)
		}
	})
	t.Run("a REPL keeps its state", func(t *testing.T) {
		p := open(t)
		for text, want := range map[string]Result{"x = 41": {}} {
			if got, err := Read(p.RunCode(t.Context(), python(text))); err != nil || got != want {
				t.Fatalf("%s: got %+v, error %v", text, got, err)
			}
		}
		if got, err := Read(p.RunCode(t.Context(), python("x + 1"))); err != nil || got != (Result{Stdout: "42\n"}) {
			t.Errorf("x + 1: got %+v, error %v, want 42", got, err)
		}
		got, err := Read(p.RunCode(t.Context(), python("raise ValueError")))
		if err != nil || got.ExitCode != 1 || !strings.Contains(got.Stderr, "ValueError") {
			t.Errorf("code that raises: got %+v, error %v, want exit code 1 and a traceback", got, err)
		}
	})
	t.Run("output arrives before the process exits", func(t *testing.T) {
		p := open(t)
		for what, start := range map[string]func() (sandbox.Process, error){
			"command": func() (sandbox.Process, error) {
				return p.RunCommand(t.Context(), command("sh", "-c", "echo first; sleep 60"))
			},
			"code": func() (sandbox.Process, error) {
				return p.RunCode(t.Context(), python("import time\nprint('first')\ntime.sleep(60)"))
			},
		} {
			process, err := start()
			if err != nil {
				t.Fatal(err)
			}
			event, err := process.Next()
			if out, ok := event.(sandbox.Output); err != nil || !ok || string(out.Data) != "first\n" || out.Stream != sandbox.Stdout {
				t.Errorf("%s: the first event is %v, error %v, want output", what, event, err)
			}
			if err := process.Close(); err != nil {
				t.Errorf("%s: close: %v", what, err)
			}
			if err := process.Close(); err != nil {
				t.Errorf("%s: close again: %v", what, err)
			}
			if event, err := process.Next(); err == nil || err == io.EOF {
				t.Errorf("%s: Next after Close: got %v, error %v, want an error", what, event, err)
			}
		}
		// The REPL is free for other runs after an interrupted one.
		if got, err := Read(p.RunCode(t.Context(), python("1 + 1"))); err != nil || got.Stdout != "2\n" {
			t.Errorf("the next run: got %+v, error %v", got, err)
		}
	})
	t.Run("a process whose output is not read blocks until it is closed", func(t *testing.T) {
		p := open(t)
		process, err := p.RunCommand(t.Context(), command("yes"))
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if _, err := process.Next(); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := Read(p.RunCommand(t.Context(), command("echo", "other"))); err != nil || got.Stdout != "other\n" {
			t.Errorf("another process meanwhile: got %+v, error %v", got, err)
		}
		process.Close()
	})
	t.Run("time limits", func(t *testing.T) {
		p := open(t)
		slow := command("sleep", "60")
		slow.Timeout = 200 * time.Millisecond
		if _, err := Read(p.RunCommand(t.Context(), slow)); !errors.Is(err, sandbox.ErrRunTimeout) {
			t.Errorf("command over its time limit: got error %v, want ErrRunTimeout", err)
		}
		code := python("import time\ntime.sleep(60)")
		code.Timeout = 2 * time.Second // enough for the REPL to start
		if _, err := Read(p.RunCode(t.Context(), code)); !errors.Is(err, sandbox.ErrRunTimeout) {
			t.Errorf("code over its time limit: got error %v, want ErrRunTimeout", err)
		}
	})
	t.Run("an interrupted run goes on", func(t *testing.T) {
		p := open(t)
		interrupt := make(chan struct{}, 1)
		code := python("import time\nprint('first')\ntime.sleep(60)")
		code.Interrupts = interrupt
		process, err := p.RunCode(t.Context(), code)
		if err != nil {
			t.Fatal(err)
		}
		if event, err := process.Next(); err != nil {
			t.Fatalf("the first event: %v, error %v", event, err)
		}
		interrupt <- struct{}{}
		if got, err := Read(process, nil); err != nil || got.ExitCode != 1 || !strings.Contains(got.Stderr, "KeyboardInterrupt") {
			t.Errorf("after the interrupt: got %+v, error %v, want exit code 1 and what the code printed after the interrupt", got, err)
		}
	})
	t.Run("runs that cannot start", func(t *testing.T) {
		p := open(t)
		if _, err := Read(p.RunCommand(t.Context(), command("no-such-program"))); !errors.Is(err, sandbox.ErrCommandNotFound) || !strings.Contains(err.Error(), `"no-such-program" not found`) {
			t.Errorf("unknown program: got error %v, want ErrCommandNotFound with its name", err)
		}
		// The command line of msb looks for this advice.
		if _, err := Read(p.RunCommand(t.Context(), command("ls | wc"))); err == nil || !strings.Contains(err.Error(), `; use command "sh" with args ["-c", "ls | wc"]`) {
			t.Errorf("command line as a program: got error %v, want advice to use a shell", err)
		}
		if _, err := Read(p.RunCommand(t.Context(), command("/etc/passwd"))); !errors.Is(err, sandbox.ErrCommandNotExecutable) || !strings.Contains(err.Error(), "/etc/passwd is not executable") {
			t.Errorf("file that is not executable: got error %v, want ErrCommandNotExecutable that says so", err)
		}
		if _, err := Read(p.RunCommand(t.Context(), command(""))); !errdefs.IsInvalidArgument(err) {
			t.Errorf("empty program: got error %v, want InvalidArgument", err)
		}
		if _, err := Read(p.RunCode(t.Context(), sandbox.Code{Language: "ruby"})); !errdefs.IsInvalidArgument(err) {
			t.Errorf("unknown language: got error %v, want InvalidArgument", err)
		}
	})
	t.Run("directories", func(t *testing.T) {
		p := open(t)
		path := sandbox.Path{Path: t.TempDir() + "/above/directory"}
		for _, want := range []bool{true, false} {
			info, created, err := p.MakeDirectory(t.Context(), path, nil)
			if err != nil || created != want || info.Path != path.Path || info.Type != sandbox.Directory || info.Mode != 0o755 {
				t.Errorf("a directory: got %+v, created %t, error %v, want created %t", info, created, err, want)
			}
		}
		if _, created, err := p.MakeDirectory(t.Context(), sandbox.Path{Path: "/"}, nil); err != nil || created {
			t.Errorf("the root directory: got created %t, error %v, want that it exists", created, err)
		}
		for _, inTheWay := range []string{"/etc/passwd", "/etc/passwd/x/y"} {
			if _, _, err := p.MakeDirectory(t.Context(), sandbox.Path{Path: inTheWay}, nil); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("a directory at %s: got error %v, want FailedPrecondition", inTheWay, err)
			}
		}
		path.User = AbsentUser
		if _, _, err := p.MakeDirectory(t.Context(), path, nil); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), AbsentUser) {
			t.Errorf("a directory for an unknown user: got error %v, want InvalidArgument", err)
		}
	})
	t.Run("a process ends when its context is canceled", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		process, err := open(t).RunCommand(ctx, command("sh", "-c", "echo started; sleep 60"))
		if err != nil {
			t.Fatal(err)
		}
		defer process.Close()
		if _, err := process.Next(); err != nil {
			t.Fatal(err)
		}
		cause := errors.New("the test ends it")
		cancel(cause)
		if _, err := process.Next(); err != cause {
			t.Errorf("Next after cancellation: got error %v, want the cause", err)
		}
	})
	t.Run("a process ends when its connection is closed", func(t *testing.T) {
		p := open(t)
		process, err := p.RunCommand(t.Context(), command("sh", "-c", "echo started; sleep 60"))
		if err != nil {
			t.Fatal(err)
		}
		defer process.Close()
		if _, err := process.Next(); err != nil {
			t.Fatal(err)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := process.Next(); !errors.Is(err, sandbox.ErrRunFailed) || errdefs.IsUnavailable(err) {
			t.Errorf("Next after the connection is closed: got error %v, want ErrRunFailed", err)
		}
		if _, err := p.RunCommand(t.Context(), command("true")); !errdefs.IsUnavailable(err) {
			t.Errorf("RunCommand after the connection is closed: got error %v, want Unavailable", err)
		}
		if _, _, err := p.MakeDirectory(t.Context(), sandbox.Path{Path: "/"}, nil); !errdefs.IsUnavailable(err) {
			t.Errorf("MakeDirectory after the connection is closed: got error %v, want Unavailable", err)
		}
		if err := p.Ping(t.Context()); !errdefs.IsUnavailable(err) {
			t.Errorf("Ping after the connection is closed: got error %v, want Unavailable", err)
		}
	})
}
