package main

import (
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"github.com/msbd/msbd/client"
	"github.com/msbd/msbd/daemon/daemontest"
)

// startPortals starts a server with the sandbox my-env, which runs real programs on this host.
func startPortals(t *testing.T) (s *daemontest.Server, env []string) {
	t.Helper()
	s, err := daemontest.StartWithPortals(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	key, err := s.Key()
	if err != nil {
		t.Fatal(err)
	}
	c := &client.Client{ServerURL: s.URL(), Key: client.NewKey(key)}
	if err := c.Sandbox("", "my-env").Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	return s, []string{"MSB_SERVER_URL=" + s.URL(), "MSB_API_KEY=" + key, "TERM=xterm"}
}

// startSession starts msb in a terminal of 90 columns.
func startSession(t *testing.T, env []string, args ...string) *daemontest.Session {
	t.Helper()
	command := exec.Command("msb", args...)
	command.Env = append(os.Environ(), env...)
	// msb ignores SIGHUP if the test does, for example under nohup. The children of a process that handles the signal do not.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	return daemontest.StartSession(t, command)
}

// columns prints the number of columns when it changes, and what is typed, and ends with 7 at Ctrl-C.
const columns = `
import os, select, signal, sys
def size(*_): os.write(1, b"%d columns\n" % os.get_terminal_size().columns)
signal.signal(signal.SIGWINCH, size)
signal.signal(signal.SIGINT, lambda *_: sys.exit(7))
os.write(1, os.environ["TERM"].encode() + b"\n")
size()
while True:
    if select.select([0], [], [], 0.02)[0]:
        os.write(1, b"got " + os.read(0, 100))`

func TestTerminalSession(t *testing.T) {
	server, env := startPortals(t)
	s := startSession(t, env, "exec", "-it", "my-env", "--", "python3", "-c", columns)
	s.Until("xterm\r\n90 columns\r\n")
	s.Resize(100, 30)
	s.Until("100 columns\r\n")
	s.Type("hello\r")
	s.Until("got hello\r\n")
	s.Type("\x03")
	s.WantEnd(7)

	// A shell.
	s = startSession(t, env, "shell", "my-env")
	s.Type("tty | tr / _\r")
	s.Until("_dev_pts_")
	s.Type("exit 3\r")
	s.WantEnd(3)

	// A signal ends msb, and the terminal is usable.
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP} {
		s = startSession(t, env, "exec", "-it", "my-env", "python3", "-c", columns)
		s.Until("90 columns\r\n")
		if err := s.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		s.Until("\x1b[?1049l")
		s.WantEnd(exitInterrupted)
	}

	// So does the end of the server. A program that it interrupts may have changed how the terminal shows text.
	s = startSession(t, env, "exec", "-it", "my-env", "--", "python3", "-c", "print('\x1b[?1049h')"+columns)
	s.Until("90 columns\r\n")
	closed := make(chan error, 1)
	go func() { closed <- server.Close() }()
	s.Until("\x1b[?1049l")
	s.Until("msb: ")
	s.WantEnd(exitNotRun)
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

func TestReplInATerminal(t *testing.T) {
	server, env := startPortals(t)
	s := startSession(t, env, "repl", "my-env")
	s.Until(">>> ")
	s.Type("x = 6 * 7\r")
	s.Until(">>> ")
	s.Type("for i in [x]:\r")
	s.Until("... ")
	s.Type("  print(i)\r")
	s.Until("... ")
	s.Type("\r")
	s.Until("42\r\n")
	s.Until(">>> ")
	s.Type("never run\x03") // discarded
	s.Until(">>> ")
	s.Type("import time; print('be' + 'gun', flush=True); time.sleep(60)\r")
	s.Until("begun\r\n")
	began := time.Now()
	s.Type("\x03") // interrupts the run
	s.Until("KeyboardInterrupt\r\n")
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("the interrupt took %s", took)
	}
	s.Until(">>> ")
	s.Type("x\r")
	s.Until("42\r\n")
	s.Until(">>> ")
	s.Type("\x04")
	s.WantEnd(0)
	if err := server.Close(); err != nil {
		t.Error(err)
	}
}

func TestIncomplete(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		language, text string
		want           bool
	}{
		{"python", "1\n", false},
		{"python", "f(1,\n", true},
		{"python", "f(1,\n  2)\n", false},
		{"python", "if x:\n", true},
		{"python", "if x:\n  y\n", true},
		{"python", "if x:\n  y\n\n", false},
		{"python", "@decorator\n", true},
		{"python", "x = {1: 2}\n", false},
		{"python", "x[1:\n", true},
		{"python", "'''\n", true},
		{"python", "'''\n: (\n'''\n", false},
		{"python", "x = 'it''s: ('\n", false},
		{"python", "x = \"\\\"(\"\n", false},
		{"python", "x = 'not closed\n", false}, // Python says so
		{"python", "x = 1 + \\\n", true},
		{"python", "# if x: (\n", false},
		{"python", "lambda: 1\n", false},
		{"python", ")\n", false},
		{"node", "f({\n", true},
		{"node", "f({ a: 1 })\n", false},
		{"node", "`one\n", true},
		{"node", "`one\ntwo`\n", false},
		{"node", "/* {\n", true},
		{"node", "/* { */ 1 // (\n", false},
		{"node", "'('\n", false},
		{"bash", "echo 1\n", false},
		{"bash", "for i in 1; do\n", true},
		{"bash", "for i in 1; do echo; done\n", false},
		{"bash", "echo 'a\n", true},
		{"bash", "cat <<E\na\n", true},
		{"bash", "cat <<E\na\nE\n", false},
		{"bash", "echo if\n", false},
		{"bash", "fi\n", false}, // Bash says so
	} {
		if got := incomplete(tt.language, tt.text); got != tt.want {
			t.Errorf("%s: %q: got %t", tt.language, tt.text, got)
		}
	}
}
