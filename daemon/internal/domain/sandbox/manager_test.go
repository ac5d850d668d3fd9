package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	. "github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

// world is a Manager and what it needs, which outlives it.
type world struct {
	*Manager
	store *sandboxtest.MemoryStore
	rt    *sandboxtest.Runtime
	guest *sandboxtest.Guest
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{store: sandboxtest.NewMemoryStore(), rt: sandboxtest.NewRuntime(), guest: sandboxtest.NewGuest()}
	w.restart(t)
	return w
}

// restart makes a new Manager over the same store and microVMs, as a new daemon would.
func (w *world) restart(t *testing.T) Recovery {
	t.Helper()
	if w.Manager != nil {
		w.Manager.Close()
	}
	w.Manager = NewManager(Options{
		Store: w.store, Runtime: w.rt,
		Connect:  w.guest.Connect,
		Defaults: Config{Image: "default", CPUs: 1, MemoryMiB: 512},
		Quota:    func(string) Quota { return Quota{} },
		MaxCPUs:  4, MaxMemoryMiB: 4096, StartTimeout: time.Minute, MaxRunTime: time.Hour,
		Log: slog.New(slog.DiscardHandler),
	})
	r, err := w.Recover(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Manager.Close)
	return r
}

// records are what the store holds.
func (w *world) records(t *testing.T) []Record {
	t.Helper()
	recs, err := w.store.Sandboxes()
	if err != nil {
		t.Fatal(err)
	}
	return recs
}

var box1 = Name{"default", "one"}

func TestStartIsIdempotentForAnEqualConfiguration(t *testing.T) {
	w := newWorld(t)
	for range 2 {
		if err := w.Start(t.Context(), box1, Request{CPUs: 2}); err != nil {
			t.Fatal(err)
		}
	}
	if n := w.rt.Len(); n != 1 {
		t.Fatalf("%d microVMs, want 1", n)
	}
	err := w.Start(t.Context(), box1, Request{CPUs: 3})
	if !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "cpus is 2, not 3") {
		t.Fatalf("another configuration: %v", err)
	}
}

func TestBadRequestsChangeNothing(t *testing.T) {
	w := newWorld(t)
	for name, c := range map[string]struct {
		name Name
		req  Request
	}{
		"sandbox name":   {Name{"default", "../x"}, Request{}},
		"empty name":     {Name{"default", ""}, Request{}},
		"namespace":      {Name{"a b", "x"}, Request{}},
		"long name":      {Name{"default", strings.Repeat("x", 64)}, Request{}},
		"too many cpus":  {box1, Request{CPUs: 5}},
		"negative cpus":  {box1, Request{CPUs: -1}},
		"little memory":  {box1, Request{MemoryMiB: 1}},
		"too much":       {box1, Request{MemoryMiB: 1 << 20}},
		"environment":    {box1, Request{Env: []string{"novalue"}}},
		"no name in env": {box1, Request{Env: []string{"=x"}}},
		"workdir":        {box1, Request{Workdir: "relative"}},
		"absent image":   {box1, Request{Image: sandboxtest.AbsentImage}},
	} {
		if err := w.Start(t.Context(), c.name, c.req); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := len(w.List("")); n != 0 || w.rt.Len() != 0 || len(w.records(t)) != 0 {
		t.Errorf("something is left: %d records", n)
	}
}

func TestFailedStartLeavesItsReasonAndNothingElse(t *testing.T) {
	w := newWorld(t)
	w.rt.OnStart = func(context.Context, string) error { return errors.New("no such luck") }
	if err := w.Start(t.Context(), box1, Request{}); !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "luck") {
		t.Fatalf("start: %v", err)
	}
	if w.rt.Len() != 0 {
		t.Error("the microVM is left")
	}
	_, err := sandboxtest.Read(w.RunCode(t.Context(), box1, Code{Language: Python}))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "its start failed") || strings.Contains(err.Error(), "luck") {
		t.Errorf("run: %v", err)
	}
	if rec := w.List("")[0]; rec.Cause != "no such luck" {
		t.Errorf("record: %+v", rec)
	}
	w.rt.OnStart = nil
	if err := w.Start(t.Context(), box1, Request{}); err != nil {
		t.Errorf("start again: %v", err)
	}
	if len(w.records(t)) != 1 {
		t.Errorf("%d records, want 1", len(w.records(t)))
	}
}

func TestStopWhileStarting(t *testing.T) {
	w := newWorld(t)
	booting := make(chan struct{})
	w.rt.OnStart = func(ctx context.Context, _ string) error {
		close(booting)
		<-ctx.Done()
		return ctx.Err()
	}
	started := make(chan error)
	go func() { started <- w.Start(context.Background(), box1, Request{}) }()
	<-booting
	if err := w.Stop(t.Context(), box1); err != nil {
		t.Errorf("stop: %v", err)
	}
	if err := <-started; err == nil || !strings.Contains(err.Error(), "stopped while it was starting") {
		t.Errorf("start: %v", err)
	}
	if w.rt.Len() != 0 || len(w.List("")) != 0 || len(w.records(t)) != 0 {
		t.Error("something is left")
	}
	if err := w.Stop(t.Context(), box1); !errdefs.IsNotFound(err) {
		t.Errorf("second stop: %v", err)
	}
}

func TestStartThatNeverAnswersIsUndone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.rt.OnStart = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
		err := w.Start(t.Context(), box1, Request{})
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "did not answer within 1m0s") {
			t.Errorf("start: %v", err)
		}
		if w.rt.Len() != 0 {
			t.Error("the microVM is left")
		}
		if recs := w.List(""); len(recs) != 1 || recs[0].State != Failed {
			t.Errorf("records: %+v", recs)
		}
		w.Manager.Close()
	})
}

// Who gives up a start, such as by a connection that broke, may not know of it, and leaves nothing.
func TestStartThatItsCallerGivesUp(t *testing.T) {
	for _, removes := range []bool{true, false} {
		w := newWorld(t)
		why := errors.New("the client has gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		w.rt.OnStart = func(ctx context.Context, _ string) error {
			cancel(why)
			<-ctx.Done()
			return ctx.Err()
		}
		if !removes {
			w.rt.OnRemove = func(context.Context, string) error { return errors.New("busy") }
		}
		if err := w.Start(ctx, box1, Request{}); !errors.Is(err, why) {
			t.Errorf("start: %v", err)
		}
		recs := w.List("")
		if removes && (len(recs) != 0 || w.rt.Len() != 0 || len(w.records(t)) != 0) {
			t.Errorf("left: %+v, %d microVMs, %d stored", recs, w.rt.Len(), len(w.records(t)))
		}
		if !removes && (len(recs) != 1 || recs[0].State != Failed || recs[0].Cause != "busy" || len(w.records(t)) != 1) {
			t.Errorf("what could not be removed is recorded as %+v", recs)
		}
	}
}

// What is left of an earlier attempt and cannot be removed does not hold its name for ever.
func TestStartAfterAnAttemptThatCannotBeRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.rt.OnStart = func(context.Context, string) error { return errors.New("no such luck") }
		if err := w.Start(t.Context(), box1, Request{}); err == nil {
			t.Fatal("it started")
		}
		w.rt.OnRemove = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
		began := time.Now()
		if err := w.Start(t.Context(), box1, Request{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("start: %v", err)
		}
		if took := time.Since(began); took != CleanupLimit {
			t.Errorf("it took %s", took)
		}
		w.Manager.Close()
	})
}

// A run waits for another's way into the sandbox no longer than for its own.
func TestWaitForAConnectionEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		if err := w.Start(t.Context(), box1, Request{}); err != nil {
			t.Fatal(err)
		}
		w.restart(t) // it has no connection any more
		w.rt.OnAttach = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
		var first sync.WaitGroup
		first.Go(func() { sandboxtest.Read(w.RunCommand(context.Background(), box1, Command{Timeout: time.Minute})) })
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if _, err := sandboxtest.Read(w.RunCommand(ctx, box1, Command{})); err == nil {
			t.Error("a run in a sandbox that cannot be reached")
		}
		if took := time.Since(began); took != time.Second {
			t.Errorf("it gave up after %s", took)
		}
		first.Wait()
		w.Manager.Close()
	})
}

func TestUnwritableStoreStartsNothing(t *testing.T) {
	w := newWorld(t)
	w.store.FailWith(errors.New("disk full"))
	if err := w.Start(t.Context(), box1, Request{}); err == nil || !strings.Contains(err.Error(), "disk full") {
		t.Fatalf("start: %v", err)
	}
	if w.rt.Len() != 0 || len(w.List("")) != 0 {
		t.Error("something is left")
	}
}

func TestDeathOfAMicroVMIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		if err := w.Start(t.Context(), box1, Request{}); err != nil {
			t.Fatal(err)
		}
		w.rt.Kill(w.List("")[0].ID)
		synctest.Wait()
		if rec := w.List("")[0]; rec.State != Failed || rec.Reason != "its microVM ended" {
			t.Errorf("record: %+v", rec)
		}
		if w.rt.Len() != 0 {
			t.Error("its remains are left")
		}
		w.Manager.Close()
	})
}

func TestRunsOfOneLanguageTakeTurnsInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		if err := w.Start(t.Context(), box1, Request{}); err != nil {
			t.Fatal(err)
		}
		var order []string
		inside := 0
		w.guest.OnRun = func(_ context.Context, run any) error {
			if inside++; inside > 1 {
				t.Error("two runs at once")
			}
			time.Sleep(time.Second)
			order = append(order, run.(Code).Text)
			inside--
			return nil
		}
		var want []string
		var runs sync.WaitGroup
		for i := range 5 {
			code := fmt.Sprint(i)
			want = append(want, code)
			runs.Go(func() { sandboxtest.Read(w.RunCode(context.Background(), box1, Code{Language: Python, Text: code})) })
			synctest.Wait()
		}
		runs.Wait()
		if !slices.Equal(order, want) {
			t.Errorf("order %v", order)
		}
		w.Manager.Close()
	})
}

func TestRunLimits(t *testing.T) {
	w := newWorld(t)
	if err := w.Start(t.Context(), box1, Request{}); err != nil {
		t.Fatal(err)
	}
	for in, want := range map[time.Duration]time.Duration{0: time.Hour, time.Second: time.Second, 1 << 62: time.Hour, -1: time.Hour} {
		var limit time.Duration
		w.guest.OnRun = func(_ context.Context, run any) error { limit = run.(Command).Timeout; return nil }
		if _, err := sandboxtest.Read(w.RunCommand(t.Context(), box1, Command{Program: "true", Timeout: in})); err != nil || limit != want {
			t.Errorf("timeout %s: %s %v, want %s", in, limit, err, want)
		}
	}
}

func TestMetrics(t *testing.T) {
	w := newWorld(t)
	if err := w.Start(t.Context(), box1, Request{}); err != nil {
		t.Fatal(err)
	}
	if err := w.Start(t.Context(), Name{"other", "two"}, Request{}); err != nil {
		t.Fatal(err)
	}
	all, err := w.Metrics(t.Context(), "", "")
	if err != nil || len(all) != 2 {
		t.Fatalf("all: %v %v", all, err)
	}
	one, err := w.Metrics(t.Context(), "default", "one")
	if err != nil || len(one) != 1 || *one[0].MemoryMiB != 5 || *one[0].DiskBytes != 77 || !one[0].Running {
		t.Fatalf("one: %v %v", one, err)
	}
	if _, err := w.Metrics(t.Context(), "default", "two"); !errdefs.IsNotFound(err) {
		t.Errorf("another namespace's: %v", err)
	}
}

func TestRestartAdoptsWhatRuns(t *testing.T) {
	w := newWorld(t)
	if err := w.Start(t.Context(), box1, Request{}); err != nil {
		t.Fatal(err)
	}
	if r := w.restart(t); r != (Recovery{Adopted: 1}) {
		t.Fatalf("recovery %+v", r)
	}
	if _, err := sandboxtest.Read(w.RunCode(t.Context(), box1, Code{Language: Python, Text: "1"})); err != nil {
		t.Fatal(err)
	}
}

func TestAManagerRefusesWorkBeforeItRecovered(t *testing.T) {
	m := NewManager(Options{Store: sandboxtest.NewMemoryStore(), Runtime: sandboxtest.NewRuntime(), Defaults: Config{Image: "x", CPUs: 1, MemoryMiB: 512}, MaxCPUs: 1, MaxMemoryMiB: 512})
	if err := m.Start(t.Context(), box1, Request{}); !errdefs.IsUnavailable(err) {
		t.Errorf("start: %v", err)
	}
	if err := m.Stop(t.Context(), box1); !errdefs.IsUnavailable(err) {
		t.Errorf("stop: %v", err)
	}
}

func TestRecoverCarriesOutThePlan(t *testing.T) {
	w := newWorld(t)
	var ids []string
	for _, r := range []Record{
		{ID: "sb-run", Name: Name{"d", "run"}, State: Running},
		{ID: "sb-dead", Name: Name{"d", "dead"}, State: Running},
		{ID: "sb-half", Name: Name{"d", "half"}, State: Starting},
		{ID: "sb-stop", Name: Name{"d", "stop"}, State: Stopping},
	} {
		if err := w.store.PutSandbox(r); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, r.ID)
	}
	w.rt = sandboxtest.NewRuntime(append(ids, "sb-unknown")...)
	w.rt.Kill("sb-dead")
	if r := w.restart(t); r != (Recovery{Adopted: 1, Lost: 1, Removed: 3}) {
		t.Errorf("recovery %+v", r)
	}
	if w.rt.Len() != 1 {
		t.Errorf("%d microVMs are left, want the running one", w.rt.Len())
	}
	var states []string
	for _, r := range w.List("") {
		states = append(states, r.Name.Name+" "+string(r.State))
	}
	if want := []string{"dead failed", "half failed", "run running"}; !slices.Equal(states, want) {
		t.Errorf("states %v, want %v", states, want)
	}
}
