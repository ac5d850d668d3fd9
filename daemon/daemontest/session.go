//go:build linux

package daemontest

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// OpenTerminal returns both ends of a pseudo-terminal.
func OpenTerminal(t testing.TB) (control, terminal *os.File) {
	t.Helper()
	control, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.Close() })
	if err := unix.IoctlSetPointerInt(int(control.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(control.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if terminal, err = os.OpenFile(filepath.Join("/dev/pts", strconv.Itoa(n)), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	return control, terminal
}

// Session is a program in a terminal of its own.
type Session struct {
	Process *os.Process

	t                 testing.TB
	command           *exec.Cmd
	control, terminal *os.File
	before            *unix.Termios // the attributes of the terminal before the program was started
	shown             []byte
}

// StartSession starts a program in a terminal of 90 columns and 30 rows.
func StartSession(t testing.TB, command *exec.Cmd) *Session {
	t.Helper()
	s := &Session{t: t, command: command}
	s.control, s.terminal = OpenTerminal(t)
	s.Resize(90, 30)
	var err error
	if s.before, err = unix.IoctlGetTermios(int(s.terminal.Fd()), unix.TCGETS); err != nil {
		t.Fatal(err)
	}
	command.Stdin, command.Stdout, command.Stderr = s.terminal, s.terminal, s.terminal
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	s.Process = command.Process
	t.Cleanup(func() { _ = s.Process.Kill() })
	return s
}

// Resize changes the size of the terminal.
func (s *Session) Resize(columns, rows uint16) {
	s.t.Helper()
	if err := unix.IoctlSetWinsize(int(s.control.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows}); err != nil {
		s.t.Fatal(err)
	}
}

// Type types keys.
func (s *Session) Type(keys string) {
	s.t.Helper()
	if _, err := s.control.WriteString(keys); err != nil {
		s.t.Fatal(err)
	}
}

// hung is the time after which a test that still waits for something fails. It is long, because a busy machine may need a
// minute for the start of a sandbox.
const hung = 5 * time.Minute

// Until reads what the program shows up to text, and returns what precedes it. It fails the test if that takes too long.
func (s *Session) Until(text string) (before string) {
	s.t.Helper()
	deadline := time.Now().Add(hung)
	for !bytes.Contains(s.shown, []byte(text)) {
		ready := []unix.PollFd{{Fd: int32(s.control.Fd()), Events: unix.POLLIN}}
		switch n, err := unix.Poll(ready, int(time.Until(deadline).Milliseconds())); {
		case err == unix.EINTR:
			continue
		case err != nil || n == 0:
			s.t.Fatalf("still waiting after %s (%v); saw %q, not %q", hung, err, s.shown, text)
		}
		p := make([]byte, 4096)
		n, err := s.control.Read(p)
		if err != nil {
			s.t.Fatalf("%v; saw %q, not %q", err, s.shown, text)
		}
		s.shown = append(s.shown, p[:n]...)
	}
	shown, rest, _ := bytes.Cut(s.shown, []byte(text))
	s.shown = rest
	return string(shown)
}

// WantEnd waits for the end of the program, checks its exit code, and checks that the terminal is as it was before.
func (s *Session) WantEnd(code int) {
	s.t.Helper()
	err := s.command.Wait()
	got := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		got = exit.ExitCode()
	}
	if got != code {
		s.t.Errorf("%s ended with %v, want %d", s.command.Path, err, code)
	}
	after, err := unix.IoctlGetTermios(int(s.terminal.Fd()), unix.TCGETS)
	if err != nil || !reflect.DeepEqual(after, s.before) {
		s.t.Errorf("the terminal was not restored: %v\n%+v\n%+v", err, s.before, after)
	}
}
