package sandbox_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
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

func TestStartIsIdempotentForAnEqualConfiguration(t *testing.T) {
	f := newFixture(t)
	for range 2 {
		if err := f.Start(t.Context(), testName, Request{CPUs: 2}); err != nil {
			t.Fatal(err)
		}
	}
	if n := f.rt.Len(); n != 1 {
		t.Fatalf("got %d microVMs, want 1", n)
	}
	err := f.Start(t.Context(), testName, Request{CPUs: 3})
	if !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "cpus is 2, not 3") {
		t.Fatalf("start with another configuration: got error %v, want AlreadyExists", err)
	}
}

func TestBadRequestsChangeNothing(t *testing.T) {
	f := newFixture(t)
	for name, c := range map[string]struct {
		name Name
		req  Request
	}{
		"bad name":                {Name{"default", "../x"}, Request{}},
		"empty name":              {Name{"default", ""}, Request{}},
		"bad namespace":           {Name{"a b", "x"}, Request{}},
		"name too long":           {Name{"default", strings.Repeat("x", 64)}, Request{}},
		"too many cpus":           {testName, Request{CPUs: 5}},
		"negative cpus":           {testName, Request{CPUs: -1}},
		"too little memory":       {testName, Request{MemoryMiB: 1}},
		"too much memory":         {testName, Request{MemoryMiB: 1 << 20}},
		"too small a disk":        {testName, Request{DiskMiB: 63}},
		"too large a disk":        {testName, Request{DiskMiB: 8193}},
		"negative disk":           {testName, Request{DiskMiB: -1}},
		"user too long":           {testName, Request{User: strings.Repeat("u", 513)}},
		"hostname too long":       {testName, Request{Hostname: strings.Repeat("h", 64)}},
		"hostname with a dot":     {testName, Request{Hostname: "a.b"}},
		"hostname with a hyphen":  {testName, Request{Hostname: "a-"}},
		"hostname, other letters": {testName, Request{Hostname: "h\u00f6st"}},
		"hostname, line feed":     {testName, Request{Hostname: "a\n"}},
		"environment, no value":   {testName, Request{Env: []string{"novalue"}}},
		"environment, no name":    {testName, Request{Env: []string{"=x"}}},
		"environment, space":      {testName, Request{Env: []string{"A B=q"}}},
		"environment, at the end": {testName, Request{Env: []string{"A =q"}}},
		"environment, tab":        {testName, Request{Env: []string{"\tA=q"}}},
		"environment, wide space": {testName, Request{Env: []string{"A\u00a0=q"}}},
		"environment, escape":     {testName, Request{Env: []string{"A\x1b=q"}}},
		"environment, NUL":        {testName, Request{Env: []string{"A=\x00"}}},
		"environment, long entry": {testName, Request{Env: []string{"A=" + strings.Repeat("x", 128<<10-2)}}},
		"environment, long":       {testName, Request{Env: slices.Repeat([]string{"A=" + strings.Repeat("x", 64<<10)}, 16)}},
		"environment, many":       {testName, Request{Env: slices.Repeat([]string{"A="}, 100_000)}},
		"relative workdir":        {testName, Request{Workdir: "relative"}},
		"image that is not there": {testName, Request{Image: sandboxtest.AbsentImage}},
	} {
		if err := f.Start(t.Context(), c.name, c.req); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got error %v, want InvalidArgument", name, err)
		}
	}
	if n := len(f.List("")); n != 0 || f.rt.Len() != 0 || len(f.records(t)) != 0 {
		t.Errorf("bad requests left %d sandboxes, %d microVMs and %d records", n, f.rt.Len(), len(f.records(t)))
	}
}

// Linux runs programs with the longest environments that a start accepts, even if a long argument follows.
func TestLongestEnvironmentsCanRun(t *testing.T) {
	f := newFixture(t)
	entries := func(n, size int) (env []string) {
		for i := range n {
			name := fmt.Sprintf("N%06d=", i)
			env = append(env, name+strings.Repeat("x", size-len(name)))
		}
		return env
	}
	for name, env := range map[string][]string{
		"long entries": entries(7, 128<<10-1),
		"many entries": entries(1<<20/(8+9), 8),
		"all bytes":    entries(8, 128<<10-9),
	} {
		if err := f.Start(t.Context(), Name{"default", "longest"}, Request{Env: env}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := f.Stop(t.Context(), Name{"default", "longest"}); err != nil {
			t.Error(err)
		}
		cmd := exec.Command("true", strings.Repeat("x", 128<<10-1))
		cmd.Env = env
		if err := cmd.Run(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := exec.Command("env", entries(1, 128<<10)...).Run(); !errors.Is(err, syscall.E2BIG) {
		t.Errorf("an entry of 128 KiB: got error %v, want E2BIG", err)
	}
}

func TestFailedStartLeavesItsReasonAndNothingElse(t *testing.T) {
	f := newFixture(t)
	f.rt.OnStart = func(context.Context, string) error { return errors.New("no such luck") }
	if err := f.Start(t.Context(), testName, Request{}); !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "luck") {
		t.Fatalf("start: %v", err)
	}
	if f.rt.Len() != 0 {
		t.Error("the microVM was not removed")
	}
	_, err := sandboxtest.Read(f.RunCode(t.Context(), testName, Code{Language: Python}))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "its start failed") || strings.Contains(err.Error(), "luck") {
		t.Errorf("run: %v", err)
	}
	if rec := f.List("")[0]; rec.Cause != "no such luck" {
		t.Errorf("record: %+v", rec)
	}
	f.rt.OnStart = nil
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Errorf("start again: %v", err)
	}
	if len(f.records(t)) != 1 {
		t.Errorf("got %d records, want 1", len(f.records(t)))
	}
}

func TestStopWhileStarting(t *testing.T) {
	f := newFixture(t)
	booting := make(chan struct{})
	f.rt.OnStart = func(ctx context.Context, _ string) error {
		close(booting)
		<-ctx.Done()
		return ctx.Err()
	}
	started := make(chan error)
	go func() { started <- f.Start(context.Background(), testName, Request{}) }()
	<-booting
	if _, err := f.RunCommand(t.Context(), testName, Command{Program: "true"}); !errdefs.IsFailedPrecondition(err) ||
		!strings.Contains(err.Error(), "is starting; try again when its state is running") {
		t.Errorf("run: %v", err)
	}
	if err := f.Stop(t.Context(), testName); err != nil {
		t.Errorf("stop: %v", err)
	}
	if err := <-started; err == nil || !strings.Contains(err.Error(), "stopped while it was starting") {
		t.Errorf("start: %v", err)
	}
	if f.rt.Len() != 0 || len(f.List("")) != 0 || len(f.records(t)) != 0 {
		t.Error("the microVM or its record was not removed")
	}
	if err := f.Stop(t.Context(), testName); !errdefs.IsNotFound(err) {
		t.Errorf("second stop: got error %v, want NotFound", err)
	}
}

func TestStartTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.rt.OnStart = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
		err := f.Start(t.Context(), testName, Request{})
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "did not answer within 1m0s") {
			t.Errorf("start: %v", err)
		}
		if f.rt.Len() != 0 {
			t.Error("the microVM was not removed")
		}
		if recs := f.List(""); len(recs) != 1 || recs[0].State != Failed {
			t.Errorf("records: %+v", recs)
		}
		f.Manager.Close()
	})
}

// A start that its caller cancels, for example because the client disconnected, leaves no microVM and no record, unless the
// microVM cannot be removed.
func TestCanceledStart(t *testing.T) {
	for _, removable := range []bool{true, false} {
		f := newFixture(t)
		errDisconnected := errors.New("the client has disconnected")
		ctx, cancel := context.WithCancelCause(t.Context())
		f.rt.OnStart = func(ctx context.Context, _ string) error {
			cancel(errDisconnected)
			<-ctx.Done()
			return ctx.Err()
		}
		if !removable {
			f.rt.OnRemove = func(context.Context, string) error { return errors.New("busy") }
		}
		if err := f.Start(ctx, testName, Request{}); !errors.Is(err, errDisconnected) {
			t.Errorf("start: got error %v, want %v", err, errDisconnected)
		}
		recs := f.List("")
		if removable && (len(recs) != 0 || f.rt.Len() != 0 || len(f.records(t)) != 0) {
			t.Errorf("not removed: %+v, %d microVMs, %d stored records", recs, f.rt.Len(), len(f.records(t)))
		}
		if !removable && (len(recs) != 1 || recs[0].State != Failed || recs[0].Cause != "busy" || len(f.records(t)) != 1) {
			t.Errorf("a microVM that cannot be removed is recorded as %+v", recs)
		}
	}
}

// If the microVM of an earlier attempt cannot be removed, a start gives up after CleanupTimeout and does not block the name
// forever.
func TestStartAfterAnAttemptThatCannotBeRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.rt.OnStart = func(context.Context, string) error { return errors.New("no such luck") }
		if err := f.Start(t.Context(), testName, Request{}); err == nil {
			t.Fatal("the sandbox started")
		}
		f.rt.OnRemove = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
		start := time.Now()
		if err := f.Start(t.Context(), testName, Request{}); !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "deadline") {
			t.Errorf("start: got error %v, want Unavailable without the cause", err)
		}
		if took := time.Since(start); took != CleanupTimeout {
			t.Errorf("the start took %s, want %s", took, CleanupTimeout)
		}
		f.Manager.Close()
	})
}

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

func TestUnwritableStoreStartsNothing(t *testing.T) {
	f := newFixture(t)
	f.store.FailWith(fmt.Errorf("write /secret/path: disk full: %w", errdefs.ErrUnavailable))
	if err := f.Start(t.Context(), testName, Request{}); !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "secret") {
		t.Fatalf("start: got error %v, want Unavailable without the cause", err)
	}
	if f.rt.Len() != 0 || len(f.List("")) != 0 {
		t.Error("a microVM or a record exists")
	}
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

func TestStartOnAFullDisk(t *testing.T) {
	f := newFixture(t)
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Fatal(err)
	}
	f.disk.full = true
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Errorf("start of a running sandbox: %v, want nil, because it needs no space", err)
	}
	other := Name{"default", "two"}
	if err := f.Start(t.Context(), other, Request{}); !errors.Is(err, ErrNoSpace) || !errdefs.IsResourceExhausted(err) {
		t.Errorf("start: got error %v, want ErrNoSpace", err)
	}
	f.disk.full = false
	f.rt.OnStart = func(context.Context, string) error {
		f.disk.full = true // by another sandbox
		return errors.New("no space left on device")
	}
	if err := f.Start(t.Context(), other, Request{}); !errors.Is(err, ErrNoSpace) {
		t.Errorf("start that fills the disk: got error %v, want ErrNoSpace", err)
	}
	if n := f.rt.Len(); n != 1 {
		t.Errorf("%d microVMs, want 1", n)
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

func TestMetrics(t *testing.T) {
	f := newFixture(t)
	two := Name{"other", "two"}
	for _, name := range []Name{testName, two} {
		if err := f.Start(t.Context(), name, Request{}); err != nil {
			t.Fatal(err)
		}
	}
	all, err := f.Metrics(t.Context(), nil, "")
	if err != nil || len(all) != 2 {
		t.Fatalf("all: %v %v", all, err)
	}
	one, err := f.Metrics(t.Context(), []string{"default"}, "one")
	if err != nil || len(one) != 1 || one[0].CPUPercent == nil || *one[0].MemoryMiB != 5 || *one[0].DiskBytes != 77 || one[0].State != Running {
		t.Fatalf("one: %v %v", one, err)
	}
	for want, namespaces := range map[string][]string{
		"sandbox default/absent does not exist":                                 {"default"},
		"sandbox absent does not exist in any of the namespaces default, other": {"default", "other"},
		"sandbox absent does not exist in any namespace":                        {},
	} {
		if _, err := f.Metrics(t.Context(), namespaces, "absent"); !errdefs.IsNotFound(err) || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("absent from %q: got error %v, want %s", namespaces, err, want)
		}
	}
	if _, err := f.Metrics(t.Context(), []string{"default"}, "two"); !errdefs.IsNotFound(err) {
		t.Errorf("sandbox of another namespace: got error %v, want NotFound", err)
	}
}

// A guest that hangs does not delay the others, and is listed with its state.
func TestMetricsOfGuestsThatHang(t *testing.T) {
	for _, hanging := range []int{1, 500} {
		synctest.Test(t, func(t *testing.T) {
			f := newFixture(t)
			for i := range hanging + 40 {
				if err := f.Start(t.Context(), Name{"default", fmt.Sprintf("s%03d", i)}, Request{}); err != nil {
					t.Fatal(err)
				}
			}
			hangs := map[string]bool{}
			for _, rec := range f.List("")[:hanging] {
				hangs[rec.ID] = true
			}
			f.rt.OnUsage = func(ctx context.Context, id string) error {
				if hangs[id] {
					<-ctx.Done()
				}
				return ctx.Err()
			}
			time.Sleep(time.Second) // a processor time since the start
			start := time.Now()
			all, err := f.Metrics(t.Context(), nil, "")
			took := time.Since(start)
			if err != nil || len(all) != hanging+40 || hanging == 1 && took > 3*time.Second || took > 10*time.Second {
				t.Errorf("%d of %d hang: got %d metrics in %s, error %v", hanging, hanging+40, len(all), took, err)
			}
			measured := 0
			for _, m := range all {
				if m.State != Running {
					t.Errorf("%s: state %s", m.Name, m.State)
				}
				if (m.CPUPercent == nil) != (m.MemoryMiB == nil) || (m.MemoryMiB == nil) != (m.DiskBytes == nil) {
					t.Errorf("%s was measured in part: %+v", m.Name, m)
				}
				if m.MemoryMiB != nil {
					measured++
				}
			}
			if hanging == 1 && measured != 40 {
				t.Errorf("%d sandboxes were measured, want 40", measured)
			}
			f.Manager.Close()
		})
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
