package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// memory is a Store that forgets with the process; fail makes its writes fail.
type memory struct {
	mu   sync.Mutex
	recs map[string]Record
	fail error
}

func (s *memory) PutSandbox(r Record) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	s.recs[r.ID] = r
	return nil
}

func (s *memory) DeleteSandbox(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	delete(s.recs, id)
	return nil
}

func (s *memory) Sandboxes() ([]Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.recs)), nil
}

// fakeRuntime keeps "microVMs" as channels that are closed when they end.
type fakeRuntime struct {
	mu        sync.Mutex
	vms       map[string]chan struct{}
	starting  func(ctx context.Context) error // runs within Start, after the VM exists
	removing  func(ctx context.Context) error // runs within Remove, before the VM goes; its error is Remove's
	attaching func(ctx context.Context) error // runs within Attach; its error is Attach's
}

func (f *fakeRuntime) Start(ctx context.Context, id string, _ Config) error {
	f.mu.Lock()
	f.vms[id] = make(chan struct{})
	hook := f.starting
	f.mu.Unlock()
	if hook != nil {
		return hook(ctx)
	}
	return nil
}

func (f *fakeRuntime) Remove(ctx context.Context, id string) error {
	if f.removing != nil {
		if err := f.removing(ctx); err != nil {
			return err
		}
	}
	f.kill(id)
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.vms, id)
	return nil
}

// kill ends a microVM from outside.
func (f *fakeRuntime) kill(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c, ok := f.vms[id]; ok {
		select {
		case <-c:
		default:
			close(c)
		}
	}
}

func (f *fakeRuntime) List(context.Context) ([]Instance, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []Instance
	for id, c := range f.vms {
		select {
		case <-c:
			all = append(all, Instance{ID: id})
		default:
			all = append(all, Instance{ID: id, Alive: true})
		}
	}
	return all, nil
}

func (f *fakeRuntime) Wait(ctx context.Context, id string) (string, error) {
	f.mu.Lock()
	c := f.vms[id]
	f.mu.Unlock()
	select {
	case <-c:
		return "its microVM ended", nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

func (f *fakeRuntime) Attach(ctx context.Context, _ string) (io.ReadWriteCloser, error) {
	if f.attaching != nil {
		if err := f.attaching(ctx); err != nil {
			return nil, err
		}
	}
	a, _ := net.Pipe()
	return a, nil
}

func (f *fakeRuntime) Usage(context.Context, string) (Usage, error) {
	return Usage{CPUTime: time.Second, MemoryBytes: 5 << 20, DiskBytes: 77}, nil
}

func (f *fakeRuntime) ResolveImage(_ context.Context, image string) error {
	if image == "absent" {
		return fmt.Errorf("image %q: %w", image, errdefs.ErrNotFound)
	}
	return nil
}

func (f *fakeRuntime) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.vms)
}

// fakePortal answers runs through a function.
type fakePortal struct {
	run func(CodeRun) (CodeResult, error)
}

func (p *fakePortal) Ping(context.Context) error { return nil }
func (p *fakePortal) RunCode(_ context.Context, r CodeRun) (CodeResult, error) {
	return p.run(r)
}
func (p *fakePortal) RunCommand(_ context.Context, r CommandRun) (CommandResult, error) {
	return CommandResult{Output: []Line{{Stdout, r.Timeout.String()}}}, nil
}
func (p *fakePortal) Close() error { return nil }

type world struct {
	*Manager
	store *memory
	rt    *fakeRuntime
	p     *fakePortal
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{store: &memory{recs: map[string]Record{}}, rt: &fakeRuntime{vms: map[string]chan struct{}{}}, p: &fakePortal{}}
	w.p.run = func(r CodeRun) (CodeResult, error) {
		return CodeResult{Success: true, Output: []Line{{Stdout, r.Code}}}, nil
	}
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
		Connect:  func(context.Context, io.ReadWriteCloser) (Portal, error) { return w.p, nil },
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

var box1 = Name{"default", "one"}

func TestStartIsIdempotentForAnEqualConfiguration(t *testing.T) {
	w := newWorld(t)
	for range 2 {
		if err := w.Start(t.Context(), box1, Request{CPUs: 2}); err != nil {
			t.Fatal(err)
		}
	}
	if n := w.rt.count(); n != 1 {
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
		"absent image":   {box1, Request{Image: "absent"}},
	} {
		if err := w.Start(t.Context(), c.name, c.req); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := len(w.List("")); n != 0 || w.rt.count() != 0 || len(w.store.recs) != 0 {
		t.Errorf("something is left: %d records", n)
	}
}

func TestFailedStartLeavesItsReasonAndNothingElse(t *testing.T) {
	w := newWorld(t)
	w.rt.starting = func(context.Context) error { return errors.New("no such luck") }
	if err := w.Start(t.Context(), box1, Request{}); !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "luck") {
		t.Fatalf("start: %v", err)
	}
	if w.rt.count() != 0 {
		t.Error("the microVM is left")
	}
	_, err := w.RunCode(t.Context(), box1, CodeRun{Language: Python})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "its start failed") || strings.Contains(err.Error(), "luck") {
		t.Errorf("run: %v", err)
	}
	if rec := w.List("")[0]; rec.Cause != "no such luck" {
		t.Errorf("record: %+v", rec)
	}
	w.rt.starting = nil
	if err := w.Start(t.Context(), box1, Request{}); err != nil {
		t.Errorf("start again: %v", err)
	}
	if len(w.store.recs) != 1 {
		t.Errorf("%d records, want 1", len(w.store.recs))
	}
}

func TestStopWhileStarting(t *testing.T) {
	w := newWorld(t)
	booting := make(chan struct{})
	w.rt.starting = func(ctx context.Context) error {
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
	if w.rt.count() != 0 || len(w.List("")) != 0 || len(w.store.recs) != 0 {
		t.Error("something is left")
	}
	if err := w.Stop(t.Context(), box1); !errdefs.IsNotFound(err) {
		t.Errorf("second stop: %v", err)
	}
}

func TestStartThatNeverAnswersIsUndone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.rt.starting = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		err := w.Start(t.Context(), box1, Request{})
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "did not answer within 1m0s") {
			t.Errorf("start: %v", err)
		}
		if w.rt.count() != 0 {
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
		w.rt.starting = func(ctx context.Context) error {
			cancel(why)
			<-ctx.Done()
			return ctx.Err()
		}
		if !removes {
			w.rt.removing = func(context.Context) error { return errors.New("busy") }
		}
		if err := w.Start(ctx, box1, Request{}); !errors.Is(err, why) {
			t.Errorf("start: %v", err)
		}
		recs := w.List("")
		if removes && (len(recs) != 0 || w.rt.count() != 0 || len(w.store.recs) != 0) {
			t.Errorf("left: %+v, %d microVMs, %d stored", recs, w.rt.count(), len(w.store.recs))
		}
		if !removes && (len(recs) != 1 || recs[0].State != Failed || recs[0].Cause != "busy" || len(w.store.recs) != 1) {
			t.Errorf("what could not be removed is recorded as %+v", recs)
		}
	}
}

// What is left of an earlier attempt and cannot be removed does not hold its name for ever.
func TestStartAfterAnAttemptThatCannotBeRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.rt.starting = func(context.Context) error { return errors.New("no such luck") }
		if err := w.Start(t.Context(), box1, Request{}); err == nil {
			t.Fatal("it started")
		}
		w.rt.removing = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		began := time.Now()
		if err := w.Start(t.Context(), box1, Request{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("start: %v", err)
		}
		if took := time.Since(began); took != cleanupLimit {
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
		w.rt.attaching = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		var first sync.WaitGroup
		first.Go(func() { w.RunCommand(context.Background(), box1, CommandRun{Timeout: time.Minute}) })
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if _, err := w.RunCommand(ctx, box1, CommandRun{}); err == nil {
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
	w.store.fail = errors.New("disk full")
	if err := w.Start(t.Context(), box1, Request{}); err == nil || !strings.Contains(err.Error(), "disk full") {
		t.Fatalf("start: %v", err)
	}
	if w.rt.count() != 0 || len(w.List("")) != 0 {
		t.Error("something is left")
	}
}

func TestDeathOfAMicroVMIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		if err := w.Start(t.Context(), box1, Request{}); err != nil {
			t.Fatal(err)
		}
		w.rt.kill(w.List("")[0].ID)
		synctest.Wait()
		if rec := w.List("")[0]; rec.State != Failed || rec.Reason != "its microVM ended" {
			t.Errorf("record: %+v", rec)
		}
		if w.rt.count() != 0 {
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
		w.p.run = func(r CodeRun) (CodeResult, error) {
			if inside++; inside > 1 {
				t.Error("two runs at once")
			}
			time.Sleep(time.Second)
			order = append(order, r.Code)
			inside--
			return CodeResult{}, nil
		}
		var want []string
		var runs sync.WaitGroup
		for i := range 5 {
			code := fmt.Sprint(i)
			want = append(want, code)
			runs.Go(func() { w.RunCode(context.Background(), box1, CodeRun{Language: Python, Code: code}) })
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
		res, err := w.RunCommand(t.Context(), box1, CommandRun{Timeout: in})
		if err != nil || res.Output[0].Text != want.String() {
			t.Errorf("timeout %s: %v %v, want %s", in, res, err, want)
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

func TestCPUPercentIsOfTheTimeSinceTheLastMeasurement(t *testing.T) {
	b := newBox(box1)
	t0 := time.Now()
	rec := Record{ID: "a", CreatedAt: t0}
	for _, c := range []struct {
		at, used time.Duration
		want     float64
	}{
		{time.Second, 500 * time.Millisecond, 50},
		{2 * time.Second, 2500 * time.Millisecond, 200},
		{2*time.Second + time.Millisecond, 3 * time.Second, 200}, // too soon: the same answer
		{4 * time.Second, 2500 * time.Millisecond, 0},
	} {
		if got := b.cpuPercent(rec, c.used, t0.Add(c.at)); got != c.want {
			t.Errorf("after %s: %v, want %v", c.at, got, c.want)
		}
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
	if _, err := w.RunCode(t.Context(), box1, CodeRun{Language: Python, Code: "1"}); err != nil {
		t.Fatal(err)
	}
}

func TestAManagerRefusesWorkBeforeItRecovered(t *testing.T) {
	m := NewManager(Options{Store: &memory{}, Runtime: &fakeRuntime{}, Defaults: Config{Image: "x", CPUs: 1, MemoryMiB: 512}, MaxCPUs: 1, MaxMemoryMiB: 512})
	if err := m.Start(t.Context(), box1, Request{}); !errdefs.IsUnavailable(err) {
		t.Errorf("start: %v", err)
	}
	if err := m.Stop(t.Context(), box1); !errdefs.IsUnavailable(err) {
		t.Errorf("stop: %v", err)
	}
}

func TestPlan(t *testing.T) {
	rec := func(id string, s State) Record { return Record{ID: id, State: s} }
	for name, c := range map[string]struct {
		recs  []Record
		found []Instance
		want  verb
	}{
		"running and alive":       {[]Record{rec("a", Running)}, []Instance{{"a", true}}, adopt},
		"running and dead":        {[]Record{rec("a", Running)}, []Instance{{"a", false}}, lose},
		"running and gone":        {[]Record{rec("a", Running)}, nil, lose},
		"start cut off":           {[]Record{rec("a", Starting)}, []Instance{{"a", true}}, undo},
		"start cut off early":     {[]Record{rec("a", Starting)}, nil, undo},
		"stop cut off":            {[]Record{rec("a", Stopping)}, []Instance{{"a", true}}, finish},
		"stop cut off late":       {[]Record{rec("a", Stopping)}, nil, finish},
		"failed":                  {[]Record{rec("a", Failed)}, nil, keep},
		"failed, not all removed": {[]Record{rec("a", Failed)}, []Instance{{"a", false}}, undo},
		"unknown microVM":         {nil, []Instance{{"a", true}}, purge},
	} {
		steps := plan(c.recs, c.found)
		if len(steps) != 1 || steps[0].do != c.want || steps[0].id != "a" {
			t.Errorf("%s: %+v, want %s", name, steps, c.want)
		}
	}
}

func TestRecoverCarriesOutThePlan(t *testing.T) {
	w := newWorld(t)
	for _, r := range []Record{
		{ID: "sb-run", Name: Name{"d", "run"}, State: Running},
		{ID: "sb-dead", Name: Name{"d", "dead"}, State: Running},
		{ID: "sb-half", Name: Name{"d", "half"}, State: Starting},
		{ID: "sb-stop", Name: Name{"d", "stop"}, State: Stopping},
	} {
		w.store.recs[r.ID] = r
		w.rt.vms[r.ID] = make(chan struct{})
	}
	w.rt.vms["sb-unknown"] = make(chan struct{})
	w.rt.kill("sb-dead")
	if r := w.restart(t); r != (Recovery{Adopted: 1, Lost: 1, Removed: 3}) {
		t.Errorf("recovery %+v", r)
	}
	if w.rt.count() != 1 {
		t.Errorf("%d microVMs are left, want the running one", w.rt.count())
	}
	var states []string
	for _, r := range w.List("") {
		states = append(states, r.Name.Name+" "+string(r.State))
	}
	if want := []string{"dead failed", "half failed", "run running"}; !slices.Equal(states, want) {
		t.Errorf("states %v, want %v", states, want)
	}
}
