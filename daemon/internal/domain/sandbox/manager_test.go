package sandbox_test

import (
	"bytes"
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

// fixture is a Manager with fake dependencies, which survive a restart of the Manager.
type fixture struct {
	*Manager
	store *sandboxtest.MemoryStore
	rt    *sandboxtest.Runtime
	guest *sandboxtest.Guest
	disk  struct {
		full  bool   // CheckSpace refuses
		free  uint64 // CheckSpace refuses more bytes than this, unless it is 0
		parts int    // how often MakeRoom still frees something
	}
	memory func() (available, total uint64, err error) // HostMemory
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{store: sandboxtest.NewMemoryStore(), rt: sandboxtest.NewRuntime(), guest: sandboxtest.NewGuest()}
	f.memory = func() (available, total uint64, err error) { return 1 << 40, 1 << 40, nil }
	f.restart(t)
	return f
}

// restart replaces the Manager by a new one with the same store and microVMs, like a restart of the daemon.
func (f *fixture) restart(t *testing.T) Recovery {
	t.Helper()
	return f.restartWith(t, func(*Options) {})
}

// restartWith is like restart, with other options.
func (f *fixture) restartWith(t *testing.T, change func(*Options)) Recovery {
	t.Helper()
	if f.Manager != nil {
		f.Manager.Close()
	}
	o := Options{
		Store: f.store, Runtime: f.rt,
		Connect:    f.guest.Connect,
		Defaults:   Config{Template: Template{Image: "default", CPUs: 1, MemoryMiB: 512, DiskMiB: 1024}},
		Quota:      func(string) Quota { return Quota{} },
		Boots:      8,
		HostMemory: func() (available, total uint64, err error) { return f.memory() },
		MaxCPUs:    4, MaxMemoryMiB: 4096, MaxDiskMiB: 8192, Disks: true, StartTimeout: time.Minute, MaxRunTime: time.Hour,
		CheckSpace: func(bytes uint64) error {
			if f.disk.full || f.disk.free > 0 && bytes > f.disk.free {
				return ErrNoSpace
			}
			return nil
		},
		MakeRoom: func() bool {
			f.disk.parts--
			return f.disk.parts >= 0
		},
		Log: slog.New(slog.DiscardHandler),
	}
	change(&o)
	f.Manager = NewManager(o)
	r, err := f.Recover(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Manager.Close)
	return r
}

// records returns the records in the store.
func (f *fixture) records(t *testing.T) []Record {
	t.Helper()
	recs, err := f.store.Sandboxes()
	if err != nil {
		t.Fatal(err)
	}
	return recs
}

var testName = Name{"default", "one"}

// A run that waits for another run to connect to the sandbox stops waiting when its context is canceled.
func TestWaitForConnectionIsCanceled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		if err := f.Start(t.Context(), testName, Request{}); err != nil {
			t.Fatal(err)
		}
		f.restart(t) // closes the connection
		f.rt.OnAttach = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
		var first sync.WaitGroup
		first.Go(func() { sandboxtest.Read(f.RunCommand(context.Background(), testName, Command{Timeout: time.Minute})) })
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if _, err := sandboxtest.Read(f.RunCommand(ctx, testName, Command{})); err == nil {
			t.Error("a run in an unreachable sandbox succeeded")
		}
		if took := time.Since(start); took != time.Second {
			t.Errorf("the run failed after %s, want 1s", took)
		}
		first.Wait()
		f.Manager.Close()
	})
}

// No error of the microVMs' host reaches a client, because it may name parts of the host. The log has it.
func TestErrorsOfTheHostStayThere(t *testing.T) {
	// An error without a class does not reach clients. Other classes must not, because they would say something about a
	// sandbox.
	f := newFixture(t)
	for _, class := range []error{errors.New("failed"), errdefs.ErrPermissionDenied, errdefs.ErrInvalidArgument, errdefs.ErrAlreadyExists} {
		f.rt.OnResolveImage = func(context.Context, string) error { return fmt.Errorf("open /secret/path: %w", class) }
		if err := f.Start(t.Context(), testName, Request{}); err == nil || errors.Is(err, class) {
			t.Errorf("an image lookup that fails with %v: got error %v, want one without a class", class, err)
		}
	}
	secret := func(context.Context, string) error {
		return fmt.Errorf("dial unix /secret/path: %w", errdefs.ErrUnavailable)
	}
	for name, tt := range map[string]struct {
		change func(*fixture)
		call   func(*fixture) error
	}{
		"the image cannot be looked up": {
			func(f *fixture) { f.rt.OnResolveImage = secret },
			func(f *fixture) error { return f.Start(t.Context(), Name{"default", "two"}, Request{}) },
		},
		"an earlier start cannot be removed": {
			func(f *fixture) {
				f.rt.OnStart = secret
				_ = f.Start(t.Context(), Name{"default", "two"}, Request{})
				f.rt.OnRemove = secret
			},
			func(f *fixture) error { return f.Start(t.Context(), Name{"default", "two"}, Request{}) },
		},
		"the microVM cannot be started": {
			func(f *fixture) { f.rt.OnStart = secret },
			func(f *fixture) error { return f.Start(t.Context(), Name{"default", "two"}, Request{}) },
		},
		"the sandbox cannot be reached": {
			func(f *fixture) { f.restart(t); f.rt.OnAttach = secret },
			func(f *fixture) error {
				_, err := f.RunCommand(t.Context(), testName, Command{Program: "true"})
				return err
			},
		},
		"the microVM cannot be removed": {
			func(f *fixture) { f.rt.OnRemove = secret },
			func(f *fixture) error { return f.Stop(t.Context(), testName) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			var log bytes.Buffer
			f.restartWith(t, func(o *Options) { o.Log = slog.New(slog.NewTextHandler(&log, nil)) })
			if err := f.Start(t.Context(), testName, Request{}); err != nil {
				t.Fatal(err)
			}
			tt.change(f)
			err := tt.call(f)
			if !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "secret") || !strings.Contains(err.Error(), "sandbox default/") {
				t.Errorf("got error %v, want Unavailable that names the sandbox and not the cause", err)
			}
			f.Manager.Close()
			if name != "the sandbox cannot be reached" && !strings.Contains(log.String(), "secret") {
				t.Errorf("the log does not have the cause: %s", log.String())
			}
		})
	}
}

// A sandbox that has filled the disk can be stopped: Stop does not need the store, and removes the microVM with disk space
// from the reserve.
func TestStopOnAFullDisk(t *testing.T) {
	f := newFixture(t)
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Fatal(err)
	}
	full := errors.New("no space left on device")
	f.store.FailWith(full)
	f.disk.full, f.disk.parts = true, 2
	f.rt.OnRemove = func(context.Context, string) error { // succeeds with the second part, and then the disk has room
		if f.disk.parts > 0 {
			return full
		}
		f.store.FailWith(nil)
		return nil
	}
	if err := f.Stop(t.Context(), testName); err != nil {
		t.Fatal(err)
	}
	if f.rt.Len() != 0 || len(f.List("")) != 0 || len(f.records(t)) != 0 {
		t.Errorf("left: %d microVMs, sandboxes %v, records %v", f.rt.Len(), f.List(""), f.records(t))
	}
}

// If the store cannot be written at all, Stop removes the microVM nevertheless. The sandbox is listed as failed until its
// record can be removed.
func TestStopWithoutTheStore(t *testing.T) {
	f := newFixture(t)
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Fatal(err)
	}
	f.store.FailWith(errors.New("input/output error"))
	if err := f.Stop(t.Context(), testName); err != nil || f.rt.Len() != 0 {
		t.Fatalf("stop: %v, %d microVMs", err, f.rt.Len())
	}
	if list := f.List(""); len(list) != 1 || list[0].State != Failed || !strings.Contains(list[0].Reason, "stopped") {
		t.Errorf("sandboxes: %+v, want one that has failed because it was stopped", list)
	}
	f.store.FailWith(nil)
	if r := f.restart(t); r.Lost != 1 {
		t.Errorf("recovery after a restart: %+v, want one lost sandbox", r)
	}
	if err := f.Stop(t.Context(), testName); err != nil || len(f.records(t)) != 0 {
		t.Errorf("stop again: %v, records %v", err, f.records(t))
	}
}

func TestDeadMicroVMIsDetected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		if err := f.Start(t.Context(), testName, Request{}); err != nil {
			t.Fatal(err)
		}
		f.rt.Kill(f.List("")[0].ID)
		synctest.Wait()
		if rec := f.List("")[0]; rec.State != Failed || rec.Reason != "its microVM ended" {
			t.Errorf("record: %+v", rec)
		}
		if f.rt.Len() != 0 {
			t.Error("its resources were not removed")
		}
		f.Manager.Close()
	})
}

func TestRunsInOneLanguageAreQueued(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		if err := f.Start(t.Context(), testName, Request{}); err != nil {
			t.Fatal(err)
		}
		var order []string
		active := 0
		f.guest.OnRun = func(_ context.Context, run any) error {
			if active++; active > 1 {
				t.Error("two runs execute at the same time")
			}
			time.Sleep(time.Second)
			order = append(order, run.(Code).Text)
			active--
			return nil
		}
		var want []string
		var runs sync.WaitGroup
		for i := range 5 {
			code := fmt.Sprint(i)
			want = append(want, code)
			runs.Go(func() {
				sandboxtest.Read(f.RunCode(context.Background(), testName, Code{Language: Python, Text: code}))
			})
			synctest.Wait()
		}
		runs.Wait()
		if !slices.Equal(order, want) {
			t.Errorf("runs executed in the order %v, want %v", order, want)
		}
		f.Manager.Close()
	})
}

func TestRunLimits(t *testing.T) {
	f := newFixture(t)
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Fatal(err)
	}
	for in, want := range map[time.Duration]time.Duration{0: time.Hour, time.Second: time.Second, 1 << 62: time.Hour, -1: time.Hour} {
		var limit time.Duration
		f.guest.OnRun = func(_ context.Context, run any) error { limit = run.(Command).Timeout; return nil }
		if _, err := sandboxtest.Read(f.RunCommand(t.Context(), testName, Command{Program: "true", Timeout: in})); err != nil || limit != want {
			t.Errorf("timeout %s became %s, want %s, error %v", in, limit, want, err)
		}
	}
}

// A sandbox has the same state in every list, and the reason is there for everyone who may use the sandbox.
func TestListAndGet(t *testing.T) {
	f := newFixture(t)
	two := Name{"other", "two"}
	if err := f.Start(t.Context(), testName, Request{CPUs: 2}); err != nil {
		t.Fatal(err)
	}
	f.rt.OnStart = func(context.Context, string) error { return errors.New("no such luck") }
	if err := f.Start(t.Context(), two, Request{}); err == nil {
		t.Fatal("the start succeeded")
	}
	for _, tt := range []struct {
		namespaces []string
		want       []Name
	}{
		{nil, []Name{testName, two}}, {[]string{"other", "default"}, []Name{testName, two}}, {[]string{"other"}, []Name{two}}, {[]string{"empty"}, nil},
	} {
		var got []Name
		recs, err := f.ListIn(tt.namespaces)
		for _, rec := range recs {
			got = append(got, rec.Name)
			one, err := f.Get(rec.Name)
			if err != nil || one.ID != rec.ID || one.Name != rec.Name || one.State != rec.State {
				t.Errorf("Get returns %+v, error %v, but ListIn %+v", one, err, rec)
			}
			measured, err := f.Metrics(t.Context(), []string{rec.Name.Namespace}, rec.Name.Name)
			if err != nil || len(measured) != 1 || measured[0].State != rec.State || measured[0].Reason != rec.Reason {
				t.Errorf("Metrics returns %+v, error %v, but ListIn %+v", measured, err, rec)
			}
		}
		if err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("%q: got %v, error %v, want %v", tt.namespaces, got, err, tt.want)
		}
	}
	if rec, err := f.Get(two); err != nil || rec.State != Failed || rec.Reason != "its start failed" {
		t.Errorf("the failed sandbox: %+v, error %v", rec, err)
	}
	if _, err := f.Get(Name{"default", "two"}); !errdefs.IsNotFound(err) {
		t.Errorf("sandbox of another namespace: got error %v, want NotFound", err)
	}
	if _, err := f.Get(Name{"default", "../two"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad name: got error %v, want InvalidArgument", err)
	}
}

func TestRestartAdoptsRunningSandboxes(t *testing.T) {
	f := newFixture(t)
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Fatal(err)
	}
	if r := f.restart(t); r != (Recovery{Adopted: 1}) {
		t.Fatalf("recovery: %+v, want 1 adopted", r)
	}
	if _, err := sandboxtest.Read(f.RunCode(t.Context(), testName, Code{Language: Python, Text: "1"})); err != nil {
		t.Fatal(err)
	}
}

func TestManagerRefusesWorkBeforeRecover(t *testing.T) {
	m := NewManager(Options{Store: sandboxtest.NewMemoryStore(), Runtime: sandboxtest.NewRuntime(), Defaults: Config{Template: Template{Image: "x", CPUs: 1, MemoryMiB: 512}}, MaxCPUs: 1, MaxMemoryMiB: 512})
	if err := m.Start(t.Context(), testName, Request{}); !errdefs.IsUnavailable(err) {
		t.Errorf("start: %v", err)
	}
	if err := m.Stop(t.Context(), testName); !errdefs.IsUnavailable(err) {
		t.Errorf("stop: %v", err)
	}
	if _, err := m.ListIn(nil); !errdefs.IsUnavailable(err) {
		t.Errorf("list: %v", err)
	}
	if _, err := m.Get(testName); !errdefs.IsUnavailable(err) {
		t.Errorf("get: %v", err)
	}
}

func TestRecoverCarriesOutThePlan(t *testing.T) {
	f := newFixture(t)
	var ids []string
	for _, r := range []Record{
		{ID: "run", Name: Name{"d", "run"}, State: Running},
		{ID: "dead", Name: Name{"d", "dead"}, State: Running},
		{ID: "half", Name: Name{"d", "half"}, State: Starting},
		{ID: "stop", Name: Name{"d", "stop"}, State: Stopping},
	} {
		if err := f.store.PutSandbox(r); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, r.ID)
	}
	f.rt = sandboxtest.NewRuntime(append(ids, "unknown")...)
	f.rt.Kill("dead")
	if r := f.restart(t); r != (Recovery{Adopted: 1, Lost: 1, Removed: 3}) {
		t.Errorf("recovery: %+v, want 1 adopted, 1 lost, 3 removed", r)
	}
	if f.rt.Len() != 1 {
		t.Errorf("%d microVMs remain, want only the running one", f.rt.Len())
	}
	var states []string
	for _, r := range f.List("") {
		states = append(states, r.Name.Name+" "+string(r.State))
	}
	if want := []string{"dead failed", "half failed", "run running"}; !slices.Equal(states, want) {
		t.Errorf("states %v, want %v", states, want)
	}
}
