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
			f := newFixture(t)
			f.Manager.Quota = func(namespace string) Quota {
				if namespace == "limited" {
					return tt.quota
				}
				return Quota{}
			}
			start := func(namespace, name string) error { return f.Start(t.Context(), Name{namespace, name}, tt.req) }
			for _, name := range []string{"a", "b", "b"} { // starting b again uses nothing more
				if err := start("limited", name); err != nil {
					t.Fatal(err)
				}
			}
			if err := start("limited", "c"); !errdefs.IsResourceExhausted(err) {
				t.Fatalf("third sandbox: got error %v, want ResourceExhausted", err)
			}
			if err := start("other", "c"); err != nil {
				t.Fatalf("in another namespace: %v", err)
			}
			if err := f.Stop(t.Context(), Name{"limited", "a"}); err != nil {
				t.Fatal(err)
			}
			if err := start("limited", "c"); err != nil {
				t.Fatalf("after a stop: %v", err)
			}
			f.restart(t)
			f.Manager.Quota = func(string) Quota { return tt.quota }
			if err := start("limited", "d"); !errdefs.IsResourceExhausted(err) {
				t.Fatalf("after a restart: got error %v, want ResourceExhausted", err)
			}
		})
	}
}

func TestQuotaHoldsForStartsAtTheSameTime(t *testing.T) {
	f := newFixture(t)
	f.Manager.Quota = func(string) Quota { return Quota{Sandboxes: 3} }
	var started, refused atomic.Int32
	var wg sync.WaitGroup
	for n := range 20 {
		wg.Go(func() {
			switch err := f.Start(t.Context(), Name{"default", fmt.Sprint("sandbox", n)}, Request{}); {
			case err == nil:
				started.Add(1)
			case errdefs.IsResourceExhausted(err):
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if started.Load() != 3 || refused.Load() != 17 {
		t.Errorf("%d starts succeeded and %d were refused, want 3 and 17", started.Load(), refused.Load())
	}
}

func TestFailedStartUsesNoQuota(t *testing.T) {
	f := newFixture(t)
	f.Manager.Quota = func(string) Quota { return Quota{Sandboxes: 1} }
	f.rt.OnStart = func(context.Context, string) error { return errors.New("no") }
	if err := f.Start(t.Context(), testName, Request{}); !errdefs.IsUnavailable(err) {
		t.Fatal(err)
	}
	f.rt.OnStart = nil
	if err := f.Start(t.Context(), Name{"default", "two"}, Request{}); err != nil {
		t.Errorf("start after a failed start: %v", err)
	}
}

func TestQuotaBoundsRuns(t *testing.T) {
	f := newFixture(t)
	f.Manager.Quota = func(string) Quota { return Quota{Runs: 1} }
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Fatal(err)
	}
	running, finish := make(chan struct{}), make(chan struct{})
	f.guest.OnRun = func(_ context.Context, run any) error {
		if _, isCode := run.(Code); isCode {
			close(running)
			<-finish
		}
		return nil
	}
	done := make(chan error)
	go func() {
		_, err := sandboxtest.Read(f.RunCode(t.Context(), testName, Code{Language: Python}))
		done <- err
	}()
	<-running
	if _, err := sandboxtest.Read(f.RunCommand(t.Context(), testName, Command{Program: "true"})); !errdefs.IsResourceExhausted(err) {
		t.Errorf("second run: got error %v, want ResourceExhausted", err)
	}
	close(finish)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := sandboxtest.Read(f.RunCommand(t.Context(), testName, Command{Program: "true"})); err != nil {
		t.Errorf("run after the first has ended: %v", err)
	}
}
