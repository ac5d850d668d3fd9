package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	. "github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

// All namespaces share the limits of the server. The error does not say what other tenants use.
func TestTotalBoundsTheServer(t *testing.T) {
	for what, tt := range map[string]struct {
		total Quota
		limit string
	}{
		"sandboxes":  {Quota{Sandboxes: 2}, "2 sandboxes"},
		"processors": {Quota{CPUs: 5}, "5 virtual processors"},
		"memory":     {Quota{MemoryMiB: 1500}, "1500 MiB of memory"},
	} {
		t.Run(what, func(t *testing.T) {
			f := newFixture(t)
			f.Manager.Total = tt.total
			start := func(namespace string) error { return f.Start(t.Context(), Name{namespace, "a"}, Request{CPUs: 2}) }
			for _, namespace := range []string{"one", "two", "two"} { // starting it again uses nothing more
				if err := start(namespace); err != nil {
					t.Fatal(err)
				}
			}
			if got, want := f.InUse(), (Quota{Sandboxes: 2, CPUs: 4, MemoryMiB: 1024, DiskMiB: 2048}); got != want {
				t.Errorf("in use: %+v, want %+v", got, want)
			}
			err := start("three")
			want := "the server is limited to " + tt.limit + " for all sandboxes together, and not enough is left for this one."
			if !errdefs.IsResourceExhausted(err) || !strings.HasPrefix(err.Error(), want) {
				t.Fatalf("third sandbox: got error %v, want %s", err, want)
			}
			if strings.Contains(err.Error(), "two") || strings.Contains(err.Error(), "1536") || len(f.List("three")) != 0 {
				t.Errorf("the refused start left %+v, and its error is %v", f.List("three"), err)
			}
			f.rt.Kill(f.List("one")[0].ID)
			for f.List("one")[0].State != Failed { // failed sandboxes do not count
				runtime.Gosched()
			}
			if err := start("three"); err != nil {
				t.Errorf("after a sandbox has failed: %v", err)
			}
		})
	}
}

// Only so many microVMs boot at a time. Further starts wait in the order in which they came. A stop or a cancellation ends the
// wait.
func TestBootsTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.restartWith(t, func(o *Options) { o.Boots, o.StartTimeout = 2, time.Hour })
		var mu sync.Mutex
		var booting, most int
		f.rt.OnStart = func(ctx context.Context, _ string) error {
			mu.Lock()
			booting++
			most = max(most, booting)
			mu.Unlock()
			time.Sleep(50 * time.Second) // a boot may take a minute
			mu.Lock()
			booting--
			mu.Unlock()
			return ctx.Err()
		}
		var wg sync.WaitGroup
		var order []string
		errs := map[string]error{}
		ctx, cancel := context.WithCancelCause(t.Context())
		errDisconnected := errors.New("the client has disconnected")
		for i := range 8 {
			name := string(rune('a' + i))
			wg.Go(func() {
				err := f.Start(ctx, Name{"default", name}, Request{})
				mu.Lock()
				defer mu.Unlock()
				order, errs[name] = append(order, name), err
			})
			time.Sleep(time.Second)
		}
		waiting, err := f.Get(Name{"default", "e"})
		if err != nil || waiting.State != Starting {
			t.Errorf("a start that waits: %+v, error %v", waiting, err)
		}
		before := time.Now()
		if err := f.Stop(t.Context(), Name{"default", "e"}); err != nil || time.Since(before) != 0 {
			t.Errorf("stopping a sandbox that waits took %s, error %v", time.Since(before), err)
		}
		time.Sleep(110 * time.Second) // c and d have booted, f and g boot, and h waits
		cancel(errDisconnected)
		synctest.Wait()
		mu.Lock()
		if got := strings.Join(order, ""); got != "eabcdh" {
			t.Errorf("the starts returned in the order %q", got)
		}
		mu.Unlock()
		wg.Wait()
		for _, name := range []string{"a", "b", "c", "d"} {
			if errs[name] != nil {
				t.Errorf("start of %s: %v", name, errs[name])
			}
		}
		if err := errs["e"]; !errdefs.IsFailedPrecondition(err) {
			t.Errorf("the stopped start: got error %v, want FailedPrecondition", err)
		}
		if err := errs["h"]; !errors.Is(err, errDisconnected) {
			t.Errorf("the canceled start: got error %v, want %v", err, errDisconnected)
		}
		if most != 2 {
			t.Errorf("%d microVMs booted at a time, want 2", most)
		}
		if recs := f.List(""); len(recs) != 4 {
			t.Errorf("records: %+v", recs)
		}
		f.Manager.Close()
	})
}

// The starts of one namespace do not delay those of another one: when starts wait, the namespaces take turns. Starts that were
// stopped or canceled have no turn, and no turn is lost.
func TestNamespacesTakeTurnsToBoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.restartWith(t, func(o *Options) { o.Boots, o.StartTimeout = 1, time.Hour })
		f.rt.OnStart = func(context.Context, string) error { time.Sleep(10 * time.Second); return nil }
		began := time.Now()
		var mu sync.Mutex
		var order []string
		var wg sync.WaitGroup
		start := func(ctx context.Context, namespace, name string) {
			wg.Go(func() {
				if err := f.Start(ctx, Name{namespace, name}, Request{}); err != nil {
					return
				}
				mu.Lock()
				defer mu.Unlock()
				order = append(order, fmt.Sprintf("%s@%.0f", name, time.Since(began).Seconds()))
			})
			synctest.Wait()
		}
		canceled, cancel := context.WithCancel(t.Context())
		for i := range 6 {
			start(t.Context(), "a", fmt.Sprint("a", i))
		}
		start(canceled, "gone", "gone0")
		start(t.Context(), "b", "b0")
		start(canceled, "b", "gone1")
		start(t.Context(), "b", "b1")
		start(t.Context(), "c", "c0")
		start(t.Context(), "stopped", "stopped0")
		cancel()
		for _, name := range []Name{{"stopped", "stopped0"}, {"a", "a3"}} {
			if err := f.Stop(t.Context(), name); err != nil {
				t.Errorf("stop %s: %v", name, err)
			}
		}
		synctest.Wait()
		if n := len(f.List("")); n != 8 || time.Since(began) != 0 {
			t.Errorf("%d sandboxes after %s, want the 8 that were neither stopped nor canceled, at once", n, time.Since(began))
		}
		wg.Wait()
		if got, want := strings.Join(order, " "), "a0@10 a1@20 b0@30 c0@40 a2@50 b1@60 a4@70 a5@80"; got != want {
			t.Errorf("the starts returned in the order\n%s, want\n%s", got, want)
		}
		start(t.Context(), "d", "d0") // the turn is free again
		wg.Wait()
		if got, want := order[len(order)-1], "d0@90"; got != want {
			t.Errorf("a start after all others: %s, want %s", got, want)
		}
		f.Manager.Close()
	})
}

func TestQuotaBoundsEachNamespace(t *testing.T) {
	for what, tt := range map[string]struct {
		quota Quota
		req   Request
	}{
		"sandboxes":  {Quota{Sandboxes: 2}, Request{}},
		"processors": {Quota{CPUs: 5}, Request{CPUs: 2}},
		"memory":     {Quota{MemoryMiB: 1500}, Request{}},
		"disk":       {Quota{DiskMiB: 2500}, Request{}},
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
