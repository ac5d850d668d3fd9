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

// newPrivate returns a containerd that is not started yet.
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

// find returns a containerd's process, and nil if there is none.
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

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for limit := time.After(30 * time.Second); !condition(); {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// A daemon adopts the containerd that runs, also if the one before was killed as soon as it had started it.
func TestAdopts(t *testing.T) {
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
	eventually(t, "it is found", func() bool { return find(t, first) != nil }) // its arguments are, a moment after its start
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	second := &Private{Binary: first.Binary, Paths: first.Paths, Log: first.Log}
	if err := second.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if adopted := find(t, second); adopted == nil || adopted.PID != launched.PID {
		t.Errorf("adopted %v, not process %d", adopted, launched.PID)
	}
	if err := second.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if !launched.Dead() {
		t.Error("it runs on after Stop")
	}
	if found := find(t, first); found != nil {
		t.Errorf("process %d is left", found.PID)
	}
}

// A containerd that died is started again, and answers its clients as before.
func TestStartsAgain(t *testing.T) {
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
		t.Errorf("%v answers, after process %d", second, first.PID)
	}
}

// A containerd that does not get ready is ended: it would hold its root.
func TestOneThatIsNotReadyIsEnded(t *testing.T) {
	p := newPrivate(t)
	why := errors.New("no time")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if err := p.Start(ctx); !errors.Is(err, why) {
		t.Errorf("Start: %v", err)
	}
	if found := find(t, p); found != nil {
		t.Errorf("process %d is left", found.PID)
	}
}

// One that ends at its start says why.
func TestOneThatEndsAtItsStart(t *testing.T) {
	p := newPrivate(t)
	p.Binary = filepath.Join(filepath.Dir(p.Address), "containerd")
	if err := os.WriteFile(p.Binary, []byte("#!/bin/sh\necho no such plugin; exit 1\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := p.Start(t.Context()); !errors.Is(err, errEnded) || !strings.Contains(err.Error(), "no such plugin") {
		t.Errorf("Start: %v", err)
	}
}
