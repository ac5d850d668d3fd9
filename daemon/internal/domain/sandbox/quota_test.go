package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"

	. "github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

func TestQuotaBoundsEachNamespace(t *testing.T) {
	for what, tt := range map[string]struct {
		quota Quota
		req   Request
	}{
		"sandboxes":  {Quota{Sandboxes: 2}, Request{}},
		"processors": {Quota{CPUs: 5}, Request{CPUs: 2}},
		"memory":     {Quota{MemoryMiB: 1500}, Request{}},
	} {
		t.Run(what, func(t *testing.T) {
			w := newWorld(t)
			w.Manager.Quota = func(namespace string) Quota {
				if namespace == "bounded" {
					return tt.quota
				}
				return Quota{}
			}
			start := func(namespace, name string) error { return w.Start(t.Context(), Name{namespace, name}, tt.req) }
			for _, name := range []string{"a", "b", "b"} { // starting b again holds nothing more
				if err := start("bounded", name); err != nil {
					t.Fatal(err)
				}
			}
			if err := start("bounded", "c"); !errdefs.IsResourceExhausted(err) {
				t.Fatalf("a third sandbox: %v", err)
			}
			if err := start("other", "c"); err != nil {
				t.Fatalf("another namespace: %v", err)
			}
			if err := w.Stop(t.Context(), Name{"bounded", "a"}); err != nil {
				t.Fatal(err)
			}
			if err := start("bounded", "c"); err != nil {
				t.Fatalf("after a stop: %v", err)
			}
			w.restart(t)
			w.Manager.Quota = func(string) Quota { return tt.quota }
			if err := start("bounded", "d"); !errdefs.IsResourceExhausted(err) {
				t.Fatalf("after a restart: %v", err)
			}
		})
	}
}

func TestQuotaHoldsForStartsAtTheSameTime(t *testing.T) {
	w := newWorld(t)
	w.Manager.Quota = func(string) Quota { return Quota{Sandboxes: 3} }
	var ok, refused atomic.Int32
	var wg sync.WaitGroup
	for n := range 20 {
		wg.Go(func() {
			switch err := w.Start(t.Context(), Name{"default", fmt.Sprint("box", n)}, Request{}); {
			case err == nil:
				ok.Add(1)
			case errdefs.IsResourceExhausted(err):
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if ok.Load() != 3 || refused.Load() != 17 {
		t.Errorf("%d started and %d refused, want 3 and 17", ok.Load(), refused.Load())
	}
}

func TestFailedStartHoldsNothing(t *testing.T) {
	w := newWorld(t)
	w.Manager.Quota = func(string) Quota { return Quota{Sandboxes: 1} }
	w.rt.OnStart = func(context.Context, string) error { return errors.New("no") }
	if err := w.Start(t.Context(), box1, Request{}); !errdefs.IsUnavailable(err) {
		t.Fatal(err)
	}
	w.rt.OnStart = nil
	if err := w.Start(t.Context(), Name{"default", "two"}, Request{}); err != nil {
		t.Errorf("after a start that failed: %v", err)
	}
}

func TestQuotaBoundsRuns(t *testing.T) {
	w := newWorld(t)
	w.Manager.Quota = func(string) Quota { return Quota{Runs: 1} }
	if err := w.Start(t.Context(), box1, Request{}); err != nil {
		t.Fatal(err)
	}
	entered, leave := make(chan struct{}), make(chan struct{})
	w.guest.OnRun = func(_ context.Context, run any) error {
		if _, isCode := run.(Code); isCode {
			close(entered)
			<-leave
		}
		return nil
	}
	done := make(chan error)
	go func() {
		_, err := sandboxtest.Read(w.RunCode(t.Context(), box1, Code{Language: Python}))
		done <- err
	}()
	<-entered
	if _, err := sandboxtest.Read(w.RunCommand(t.Context(), box1, Command{Program: "true"})); !errdefs.IsResourceExhausted(err) {
		t.Errorf("a second run: %v", err)
	}
	close(leave)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := sandboxtest.Read(w.RunCommand(t.Context(), box1, Command{Program: "true"})); err != nil {
		t.Errorf("after the first: %v", err)
	}
}
