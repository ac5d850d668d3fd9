package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	. "github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

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
