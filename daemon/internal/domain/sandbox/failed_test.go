package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	. "github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// The record of a failed sandbox has no environment, however the sandbox failed.
func TestFailedSandboxesHaveNoEnvironment(t *testing.T) {
	f := newFixture(t)
	env := []string{"A=b"}
	for _, name := range []string{"dies", "unstoppable", "fails"} {
		if name == "fails" {
			f.rt.OnStart = func(context.Context, string) error { return errors.New("no such luck") }
		}
		if err := f.Start(t.Context(), Name{"default", name}, Request{Env: env}); (err == nil) != (name != "fails") {
			t.Fatalf("start %s: %v", name, err)
		}
	}
	f.Manager.Close()
	f.rt.Kill(f.List("")[0].ID)
	kept := Record{ID: "sb-kept", Name: Name{"default", "kept"}, State: Failed, Config: Config{Binding: Binding{Env: env}}} // by an earlier version
	if err := f.store.PutSandbox(kept); err != nil {
		t.Fatal(err)
	}
	f.restart(t)
	f.rt.OnRemove = func(context.Context, string) error { return errors.New("busy") }
	if err := f.Stop(t.Context(), Name{"default", "unstoppable"}); err == nil {
		t.Error("the stop succeeded")
	}
	recs := append(f.List(""), f.records(t)...)
	for _, rec := range recs {
		if rec.State != Failed || len(rec.Config.Env) != 0 {
			t.Errorf("%s is %s, with the environment %q", rec.Name, rec.State, rec.Config.Env)
		}
	}
	if len(recs) != 8 {
		t.Errorf("%d records, want 4 in memory and 4 in the store", len(recs))
	}
}

// However many sandboxes of a tenant namespace fail, only so many records are kept: the newest. Other namespaces do not count.
// A failed sandbox whose microVM cannot be removed is kept until it can be removed.
func TestFailedSandboxesAreBounded(t *testing.T) {
	f := newFixture(t)
	f.rt.OnStart = func(context.Context, string) error { return errors.New("no such luck") }
	start := func(namespace, name string) {
		t.Helper()
		if err := f.Start(t.Context(), Name{namespace, name}, Request{}); err == nil {
			t.Errorf("%s/%s started", namespace, name)
		}
	}
	check := func(when string, want []string) {
		t.Helper()
		var listed, stored []string
		for _, rec := range f.List("a") {
			listed = append(listed, rec.Name.Name)
		}
		for _, rec := range f.records(t) {
			if rec.Name.Namespace == "a" {
				stored = append(stored, rec.Name.Name)
			}
		}
		slices.Sort(stored)
		if !slices.Equal(listed, want) || !slices.Equal(stored, want) {
			t.Errorf("%s: %d sandboxes and %d records, want %d:\n%q\n%q\n%q", when, len(listed), len(stored), len(want), listed, stored, want)
		}
	}
	var names []string
	for i := range MaxFailed + 3 {
		names = append(names, fmt.Sprintf("f%03d", i))
	}
	start("b", "other")
	for _, name := range names[:MaxFailed+2] {
		start("a", name)
	}
	check("after many failures", names[2:MaxFailed+2])
	start("a", names[2]) // it is the newest now
	check("after a failure of the oldest", names[2:MaxFailed+2])

	f.rt.OnRemove = func(context.Context, string) error { return errors.New("busy") }
	start("a", names[MaxFailed+2])
	check("while no microVM can be removed", names[2:])
	f.rt.OnRemove = nil
	start("a", names[MaxFailed+2])
	check("when microVMs can be removed", slices.Concat(names[2:3], names[4:]))

	for i := range MaxFailed { // by an earlier version
		name := fmt.Sprintf("old%03d", i)
		rec := Record{ID: name, Name: Name{"a", name}, State: Failed, CreatedAt: time.Now().Add(-time.Hour)}
		if err := f.store.PutSandbox(rec); err != nil {
			t.Fatal(err)
		}
	}
	f.restart(t)
	check("after a restart", slices.Concat(names[2:3], names[4:]))
	if n := len(f.List("b")); n != 1 {
		t.Errorf("%d sandboxes in the other namespace, want 1", n)
	}
}

// There is a bound for all namespaces together, so that a key for all of them cannot evade the bound of each.
func TestFailedSandboxesOfAllNamespacesAreBounded(t *testing.T) {
	f := newFixture(t)
	f.rt.OnStart = func(context.Context, string) error { return errors.New("no such luck") }
	for i := range MaxAllFailed {
		n := Name{fmt.Sprintf("n%d", i), "old"}
		rec := Record{ID: fmt.Sprintf("%020d", i), Name: n, State: Failed, CreatedAt: time.Now().Add(time.Duration(i-MaxAllFailed) * time.Second)}
		if err := f.store.PutSandbox(rec); err != nil {
			t.Fatal(err)
		}
	}
	f.restart(t)
	for i := range 3 {
		if err := f.Start(t.Context(), Name{fmt.Sprintf("new%d", i), "a"}, Request{}); err == nil {
			t.Error("a sandbox started")
		}
	}
	kept := map[string]bool{}
	for _, rec := range f.List("") {
		kept[rec.Name.Namespace] = true
	}
	if len(kept) != MaxAllFailed || kept["n0"] || kept["n2"] || !kept["n3"] || !kept["new0"] {
		t.Errorf("%d sandboxes are kept, want the %d newest", len(kept), MaxAllFailed)
	}
	if stored := len(f.records(t)); stored != MaxAllFailed {
		t.Errorf("%d records are stored, want %d", stored, MaxAllFailed)
	}
}

// The bound holds if many starts fail, and their sandboxes are stopped and started again, at the same time.
func TestFailedSandboxesAreBoundedAtTheSameTime(t *testing.T) {
	f := newFixture(t)
	f.rt.OnStart = func(context.Context, string) error { return errors.New("no such luck") }
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range MaxFailed {
				name := Name{"a", fmt.Sprintf("f%d", (i*MaxFailed/2+n)%(4*MaxFailed))}
				if err := f.Start(t.Context(), name, Request{}); err == nil {
					t.Errorf("%s started", name)
				}
				if n%10 == 0 {
					_ = f.Stop(t.Context(), name)
				}
			}
		})
	}
	wg.Wait()
	if err := f.Start(t.Context(), Name{"a", "last"}, Request{}); err == nil {
		t.Error("the last sandbox started")
	}
	if listed, stored := len(f.List("")), len(f.records(t)); listed == 0 || listed > MaxFailed || stored != listed {
		t.Errorf("%d sandboxes and %d records, want as many, and at most %d", listed, stored, MaxFailed)
	}
}
