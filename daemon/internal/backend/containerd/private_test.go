package containerd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// plantedProcess is the name under which the test program acts as a planted process. It blocks until it is killed.
const plantedProcess = "containerd-test-planted"

func TestMain(m *testing.M) {
	if os.Args[0] == plantedProcess {
		io.Copy(io.Discard, os.Stdin) // never ends
		return
	}
	os.Exit(m.Run())
}

// newPrivate returns a containerd that has not been started.
func newPrivate(t *testing.T) *Private {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "containerd") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	binary, err := filepath.Abs("../../../../bin/containerd")
	if err != nil {
		t.Fatal(err)
	}
	return &Private{
		Binary: binary, Log: slog.New(slog.DiscardHandler),
		Paths: Paths{Address: filepath.Join(dir, "containerd.sock"), Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state")},
	}
}

// find returns the process of a containerd, or nil if none is running.
func find(t *testing.T, p *Private) *process.Process {
	t.Helper()
	found, err := p.Process()
	if err != nil {
		t.Fatal(err)
	}
	if found != nil {
		t.Cleanup(found.Close)
	}
	return found
}

func waitUntil(t *testing.T, what string, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(30 * time.Second); !condition(); {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("timed out waiting until %s", what)
		}
	}
}

// A daemon adopts a running containerd, even if the previous daemon was killed right after launching it.
func TestAdoptsRunningContainerd(t *testing.T) {
	first := newPrivate(t)
	launched, err := first.launch()
	if err != nil {
		t.Fatalf("%v: run make build", err)
	}
	t.Cleanup(func() {
		if err := launched.Kill(context.Background()); err != nil {
			t.Error(err)
		}
		launched.Close()
	})
	// It has a lower limit of open files than this daemon.
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prlimit(launched.PID, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 500, Max: limit.Max}, nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	second := &Private{Binary: first.Binary, Paths: first.Paths, Log: first.Log}
	if err := second.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if adopted := find(t, second); adopted == nil || adopted.PID != launched.PID {
		t.Errorf("adopted %v, want process %d", adopted, launched.PID)
	}
	var raised unix.Rlimit
	if err := unix.Prlimit(launched.PID, unix.RLIMIT_NOFILE, nil, &raised); err != nil || raised != limit {
		t.Errorf("the adopted containerd has the limit of open files %v, %v, want %v", raised, err, limit)
	}
	if err := second.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if !launched.Dead() {
		t.Error("containerd still runs after Stop")
	}
	if found := find(t, first); found != nil {
		t.Errorf("process %d still runs after Stop", found.PID)
	}
}

// A local user can start a process with containerd's arguments. It does not prevent a start, and Stop does not end it.
// This also holds for a process of root's with another executable.
func TestPlantedContainerd(t *testing.T) {
	p := newPrivate(t)
	var planted []*exec.Cmd
	for _, uid := range []uint32{65534, 0} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Args = []string{plantedProcess, "--config", p.configFile()}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		if _, err := cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		waitUntil(t, "its arguments are visible", func() bool { return slices.Equal(process.Arguments(cmd.Process.Pid), cmd.Args) })
		planted = append(planted, cmd)
	}
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	launched := find(t, p)
	if launched == nil {
		t.Fatal("the containerd that was started is not found")
	}
	// An earlier version of msbd did not record the process.
	if err := os.Remove(p.processFile()); err != nil {
		t.Fatal(err)
	}
	if adopted := find(t, p); adopted == nil || adopted.PID != launched.PID {
		t.Errorf("without a record, found %v, want process %d", adopted, launched.PID)
	}
	if err := p.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !launched.Dead() {
		t.Error("containerd still runs after Stop")
	}
	for _, cmd := range planted {
		if err := cmd.Process.Signal(syscall.Signal(0)); err != nil {
			t.Errorf("the planted process was ended: %v", err)
		}
	}
}

// A containerd that died is restarted, and existing clients can use it.
func TestRestartsDeadContainerd(t *testing.T) {
	p := newPrivate(t)
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	client, err := Dial(p.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	first := find(t, p)
	if err := first.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := WaitServing(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	if second := find(t, p); second == nil || second.PID == first.PID {
		t.Errorf("process %v serves after process %d was killed, want a new one", second, first.PID)
	}
}

// If containerd does not start serving, Start stops it, because it would keep its root directory locked.
func TestStartStopsContainerdThatDoesNotServe(t *testing.T) {
	p := newPrivate(t)
	want := errors.New("canceled")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(want)
	if err := p.Start(ctx); !errors.Is(err, want) {
		t.Errorf("Start: %v", err)
	}
	if found := find(t, p); found != nil {
		t.Errorf("process %d still runs", found.PID)
	}
}

// If containerd exits while starting, the error of Start has the end of its log.
func TestStartReportsLogOfContainerdThatExits(t *testing.T) {
	p := newPrivate(t)
	p.Binary = filepath.Join(filepath.Dir(p.Address), "containerd")
	if err := os.WriteFile(p.Binary, []byte("#!/bin/sh\necho no such plugin; exit 1\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := p.Start(t.Context()); !errors.Is(err, errExited) || !strings.Contains(err.Error(), "no such plugin") {
		t.Errorf("Start: %v", err)
	}
}
