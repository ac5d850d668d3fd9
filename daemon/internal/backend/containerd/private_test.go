package containerd

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/sys/process"
)

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
	// Its arguments become visible only a moment after the start.
	waitUntil(t, "containerd is found", func() bool { return find(t, first) != nil })
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	second := &Private{Binary: first.Binary, Paths: first.Paths, Log: first.Log}
	if err := second.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if adopted := find(t, second); adopted == nil || adopted.PID != launched.PID {
		t.Errorf("adopted %v, want process %d", adopted, launched.PID)
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
