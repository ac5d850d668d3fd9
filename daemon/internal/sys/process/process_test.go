package process

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func TestProcess(t *testing.T) {
	// A name with the characters that follow the name in /proc/PID/stat.
	program := filepath.Join(t.TempDir(), "a) S 1 2")
	if err := os.Symlink("/bin/sleep", program); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	t.Cleanup(func() { cmd.Process.Kill() })
	p, err := Open(pid)
	if p == nil || err != nil {
		t.Fatalf("Open = %v, %v", p, err)
	}
	defer p.Close()
	id, err := p.ID()
	if err != nil || id.PID != pid {
		t.Errorf("ID = %v, %v", id, err)
	}
	if parent, err := Parent(pid); err != nil || parent != os.Getpid() {
		t.Errorf("Parent = %d, %v, want this process, %d", parent, err, os.Getpid())
	}
	if again, err := id.Open(); again == nil || err != nil {
		t.Errorf("Open of %v = %v, %v", id, again, err)
	} else {
		again.Close()
	}
	for _, other := range []ID{{}, {PID: pid}, {PID: pid, Start: id.Start + 1}, {PID: -1, Start: id.Start}} {
		if p, err := other.Open(); p != nil || err != nil {
			t.Errorf("Open of %v, which does not exist, = %v, %v", other, p, err)
		}
	}

	if args := Arguments(os.Getpid()); !slices.Equal(args, os.Args) {
		t.Errorf("Arguments = %q, want %q", args, os.Args)
	}
	if p.Dead() {
		t.Error("the running process is reported dead")
	}
	cause := errors.New("the caller canceled")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if err := p.Wait(ctx); !errors.Is(err, cause) {
		t.Errorf("Wait with a canceled context = %v, want %v", err, cause)
	}
	if err := p.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !p.Dead() { // it is not reaped yet
		t.Error("the killed process is not reported dead")
	}
	if err := p.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	if again, err := p.ID(); again != id || err != nil { // a start records a process even if it ends at once
		t.Errorf("ID of a process that is not reaped = %v, %v, want %v", again, err, id)
	}
	if p, err := id.Open(); p != nil || err != nil {
		t.Errorf("Open of a dead process = %v, %v, want nil, nil", p, err)
	}
	cmd.Wait()
	if p, err := Open(pid); p != nil || err != nil {
		t.Errorf("Open of a reaped process = %v, %v, want nil, nil", p, err)
	}
	if _, err := p.ID(); err == nil {
		t.Error("ID of a reaped process succeeded")
	}
	if args := Arguments(pid); !slices.Equal(args, []string{""}) {
		t.Errorf("Arguments of a reaped process = %q, want one empty argument", args)
	}
}

// Wait works for a process that is not a child of this one, also after a canceled Wait and in several goroutines.
func TestWaitForANonChild(t *testing.T) {
	cmd := exec.Command("/bin/sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	p, err := Open(pid)
	if p == nil || err != nil {
		t.Fatalf("Open = %v, %v", p, err)
	}
	defer p.Close()
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Wait(canceled); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait with a canceled context = %v", err)
	}
	ended := make(chan error)
	for range 2 {
		go func() { ended <- p.Wait(t.Context()) }()
	}
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	p.Close()
	if err := p.Wait(t.Context()); err == nil {
		t.Error("Wait succeeded after Close")
	}
}

// Kill works even if there is no free descriptor.
func TestKillWithoutDescriptors(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go cmd.Wait()
	p, err := Open(cmd.Process.Pid)
	if p == nil || err != nil {
		t.Fatalf("Open = %v, %v", p, err)
	}
	defer p.Close()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 1, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	killed := p.Kill(t.Context())
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if killed != nil || !p.Dead() {
		t.Errorf("Kill = %v, dead: %t; want nil and true", killed, p.Dead())
	}
}

// A descriptor of another process is a descriptor of the same file here, which remains when the process has ended.
func TestDescriptor(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	p, err := Open(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err := p.Descriptor(1000); !errors.Is(err, syscall.EBADF) {
		t.Errorf("a descriptor that is not open: %v", err)
	}
	fd, err := p.Descriptor(0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(fd), "pipe")
	defer theirs.Close()
	if err := p.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2)
	if n, err := theirs.Read(buf); n != 1 || buf[0] != 'x' || err != nil {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the process was not killed")
	}
	if _, err := p.Descriptor(0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("a descriptor of a process that has ended: %v", err)
	}
}
