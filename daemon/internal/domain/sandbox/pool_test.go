package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	. "github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

// poolFixture is a fixture whose Manager has a pool.
type poolFixture struct {
	*fixture
	cancel context.CancelFunc
	ended  chan struct{}

	onStart, onRemove, onResolveImage, onSetHostname, onWarm hook
}

// hook is a hook of a fake that can be set while the pool uses the fake.
type hook struct {
	f atomic.Pointer[func(ctx context.Context, what string) error]
}

func (h *hook) set(f func(ctx context.Context, what string) error) { h.f.Store(&f) }
func (h *hook) unset()                                             { h.f.Store(nil) }

func (h *hook) call(ctx context.Context, what string) error {
	if f := h.f.Load(); f != nil {
		return (*f)(ctx, what)
	}
	return nil
}

// withPool calls test in a bubble with a pool that begins with least and most, and stops the pool after it.
func withPool(t *testing.T, least, most int, test func(t *testing.T, f *poolFixture)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := &poolFixture{fixture: newFixture(t)}
		f.rt.OnStart, f.rt.OnRemove, f.rt.OnResolveImage, f.rt.OnSetHostname = f.onStart.call, f.onRemove.call, f.onResolveImage.call, f.onSetHostname.call
		f.guest.OnWarm = func(ctx context.Context, languages []Language) error {
			return f.onWarm.call(ctx, fmt.Sprint(languages))
		}
		f.reopen(t, least, most)
		defer func() {
			f.pause()
			f.Manager.Close()
		}()
		test(t, f)
	})
}

// reopen restarts the Manager, and its pool.
func (f *poolFixture) reopen(t *testing.T, least, most int) Recovery {
	t.Helper()
	f.pause()
	r := f.restartWith(t, func(o *Options) { o.Pool = PoolOptions{Min: least, Max: most, MemoryMiB: 64 << 10} })
	ctx, cancel := context.WithCancel(t.Context())
	f.cancel, f.ended = cancel, make(chan struct{})
	go func() {
		defer close(f.ended)
		if err := f.RunPool(ctx); err != nil {
			t.Error(err)
		}
	}()
	synctest.Wait()
	return r
}

// refillDelay is how long a refill waits after an entry was taken.
const refillDelay = 300 * time.Millisecond

// awaitRefill waits until the pool is filled after an entry was taken.
func (f *poolFixture) awaitRefill() {
	time.Sleep(refillDelay)
	synctest.Wait()
}

// pause ends the loop of the pool.
func (f *poolFixture) pause() {
	if f.cancel != nil {
		f.cancel()
		<-f.ended
	}
}

// entries returns the ids of the records of the pool.
func (f *poolFixture) entries(t *testing.T) (ids []string) {
	t.Helper()
	for _, rec := range f.records(t) {
		if rec.State == Pooled {
			ids = append(ids, rec.ID)
		}
	}
	slices.Sort(ids)
	return ids
}

// start starts a sandbox and returns its record.
func (f *poolFixture) start(t *testing.T, name string, req Request) Record {
	t.Helper()
	if err := f.Start(t.Context(), Name{"default", name}, req); err != nil {
		t.Fatal(err)
	}
	rec, err := f.Get(Name{"default", name})
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

// status returns the status of the pool of the default template.
func (f *poolFixture) status(t *testing.T) TemplateStatus {
	t.Helper()
	s := f.PoolStatus()
	if s.Off != "" || len(s.Templates) == 0 || !s.Templates[0].Default {
		t.Fatalf("status: %+v", s)
	}
	return s.Templates[0]
}

// Entries are replaced when they are old, when their microVM or connection ends, and removed with their template or image.
func TestEntriesThatAreReplaced(t *testing.T) {
	withPool(t, 1, 1, func(t *testing.T, f *poolFixture) {
		last := f.entries(t)
		replaced := func(what string, want int) {
			t.Helper()
			synctest.Wait()
			now := f.entries(t)
			if len(now) != want || want > 0 && slices.Equal(now, last) || f.rt.Len() != want || len(f.records(t)) != want {
				t.Errorf("%s: the pool has the entries %v, and had %v; %d microVMs, %d records", what, now, last, f.rt.Len(), len(f.records(t)))
			}
			last = now
		}
		time.Sleep(12*time.Hour - time.Minute)
		if now := f.entries(t); !slices.Equal(now, last) {
			t.Errorf("after less than 12 h, the entries are %v, and were %v", now, last)
		}
		time.Sleep(2 * time.Minute)
		replaced("age", 1)
		f.rt.Kill(last[0])
		replaced("end", 1)
		f.rt.ReplaceImage("default", "sha256:new")
		time.Sleep(time.Minute)
		replaced("replaced image", 1)
		f.onResolveImage.set(func(context.Context, string) error { return fmt.Errorf("no image: %w", errdefs.ErrNotFound) })
		time.Sleep(time.Minute)
		replaced("removed image", 0)
		if s := f.status(t); s.Waits != "the image has not been imported" || s.Target != 0 {
			t.Errorf("status: %+v", s)
		}
		f.onResolveImage.unset()
		time.Sleep(time.Minute)
		replaced("imported image", 1)
		f.onResolveImage.set(func(context.Context, string) error { return errors.New("containerd does not answer") })
		time.Sleep(time.Minute)
		if now := f.entries(t); !slices.Equal(now, last) {
			t.Errorf("while images cannot be found, the entries are %v, and were %v", now, last)
		}
		f.onResolveImage.unset()
		if _, err := f.SetPool(t.Context(), Request{}, 0, 0); err != nil {
			t.Fatal(err)
		}
		replaced("max 0", 0)
	})
}

// A microVM that cannot be removed is tried again, and not all the time.
func TestEntryThatCannotBeRemoved(t *testing.T) {
	withPool(t, 1, 1, func(t *testing.T, f *poolFixture) {
		ids, attempts := f.entries(t), 0
		f.onRemove.set(func(_ context.Context, id string) error {
			if id != ids[0] {
				return nil
			}
			attempts++
			return errors.New("busy")
		})
		f.rt.Kill(ids[0])
		time.Sleep(time.Minute)
		synctest.Wait()
		if attempts < 4 || attempts > 5 || f.store.Records()[ids[0]].State != Pooled {
			t.Errorf("%d attempts in a minute, record %+v", attempts, f.store.Records()[ids[0]])
		}
		if err := func() error { _, err := f.StopAll(t.Context()); return err }(); err == nil {
			t.Error("StopAll reports no error")
		}
		f.onRemove.unset()
		time.Sleep(time.Minute)
		if len(f.entries(t)) != 1 || f.rt.Len() != 1 {
			t.Errorf("entries %v, %d microVMs", f.entries(t), f.rt.Len())
		}
	})
}

// The sizes that an administrator sets are stored. Wrong ones change nothing.
func TestSetPool(t *testing.T) {
	withPool(t, 1, 2, func(t *testing.T, f *poolFixture) {
		other := Request{Image: "other", CPUs: 2, MemoryMiB: 256, DiskMiB: 64}
		size, err := f.SetPool(t.Context(), other, 2, 3)
		if want := (PoolSize{Template{"other", 2, 256, 64}, 2, 3}); err != nil || size != want {
			t.Errorf("set %+v, error %v", size, err)
		}
		for what, c := range map[string]struct {
			req         Request
			least, most int
			class       func(error) bool
		}{
			"min above max": {Request{}, 3, 2, errdefs.IsInvalidArgument},
			"negative":      {Request{}, -1, 2, errdefs.IsInvalidArgument},
			"too many":      {Request{}, 1, 101, errdefs.IsInvalidArgument},
			"too many cpus": {Request{CPUs: 99}, 1, 1, errdefs.IsInvalidArgument},
			"absent image":  {Request{Image: sandboxtest.AbsentImage}, 1, 1, errdefs.IsNotFound},
		} {
			if _, err := f.SetPool(t.Context(), c.req, c.least, c.most); !c.class(err) {
				t.Errorf("%s: %v", what, err)
			}
		}
		f.store.FailWith(errors.New("disk full"))
		if _, err := f.SetPool(t.Context(), Request{}, 2, 2); err == nil {
			t.Error("a size that was not stored is accepted")
		}
		f.store.FailWith(nil)
		f.reopen(t, 1, 2)
		time.Sleep(time.Minute)
		s := f.PoolStatus()
		if len(s.Templates) != 2 || s.Templates[0].Min != 1 || s.Templates[0].Ready != 1 || s.Templates[1].PoolSize != size || s.Templates[1].Ready != 2 ||
			s.MemoryMiB != 512+2*256 {
			t.Errorf("after a restart: %+v", s)
		}
		if rec := f.start(t, "one", other); rec.Origin.From != FromPool {
			t.Errorf("origin %+v", rec.Origin)
		}
		if _, err := f.SetPool(t.Context(), other, 0, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := f.SetPool(t.Context(), Request{}, 3, 3); err != nil {
			t.Fatal(err)
		}
		f.reopen(t, 1, 2)
		if s := f.PoolStatus(); len(s.Templates) != 1 || s.Templates[0].Ready != 3 || s.Templates[0].Max != 3 {
			t.Errorf("status: %+v", s)
		}
	})
}

// A pool that is set while the loop looks for images is filled immediately.
func TestSetPoolWhileImagesAreFound(t *testing.T) {
	withPool(t, 1, 1, func(t *testing.T, f *poolFixture) {
		looking, found := make(chan struct{}, 1), make(chan struct{})
		f.onResolveImage.set(func(_ context.Context, image string) error {
			if image == "default" {
				looking <- struct{}{}
				<-found
			}
			return nil
		})
		<-looking
		if _, err := f.SetPool(t.Context(), Request{Image: "other"}, 1, 1); err != nil {
			t.Fatal(err)
		}
		f.onResolveImage.unset()
		close(found)
		synctest.Wait()
		if s := f.PoolStatus(); len(s.Templates) != 2 || s.Templates[1].Ready != 1 {
			t.Errorf("status: %+v", s)
		}
	})
}

// A server without a pool removes the entries of an earlier one, and refuses sizes.
func TestNoPool(t *testing.T) {
	withPool(t, 1, 1, func(t *testing.T, f *poolFixture) {
		for want, o := range map[string]PoolOptions{"the setting pool-min is 0": {Max: 3}, "it cannot": {Unsupported: "it cannot", Min: 1, Max: 1}} {
			f.reopen(t, 1, 1)
			if len(f.entries(t)) != 1 {
				t.Fatal("there is no entry")
			}
			f.pause()
			r := f.restartWith(t, func(options *Options) { options.Pool = o })
			if r.Removed != 1 || f.rt.Len() != 0 || len(f.records(t)) != 0 {
				t.Errorf("%s: recovery %+v, %d microVMs", want, r, f.rt.Len())
			}
			if err := f.RunPool(t.Context()); err != nil {
				t.Error(err)
			}
			if s := f.PoolStatus(); s.Off != want {
				t.Errorf("status: %+v", s)
			}
			if _, err := f.SetPool(t.Context(), Request{}, 1, 1); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), want) {
				t.Errorf("set: %v", err)
			}
			if rec := f.start(t, "one", Request{}); rec.Origin != (Origin{Cold, "this runtime has no templates"}) {
				t.Errorf("origin %+v", rec.Origin)
			}
			if err := f.Stop(t.Context(), testName); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// StopAll stops the entries, ends a refill in progress, and keeps the pool empty.
func TestStopAllEmptiesThePool(t *testing.T) {
	withPool(t, 1, 1, func(t *testing.T, f *poolFixture) {
		f.onStart.set(func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() })
		f.start(t, "one", Request{})
		f.awaitRefill()
		if _, err := f.SetPool(t.Context(), Request{}, 2, 2); err != nil {
			t.Fatal(err)
		}
		f.awaitRefill()
		if s := f.status(t); !s.Filling {
			t.Fatalf("status: %+v", s)
		}
		n, err := f.StopAll(t.Context())
		if err != nil || n != 1 || f.rt.Len() != 0 || len(f.records(t)) != 0 {
			t.Errorf("stopped %d, error %v, %d microVMs, records %+v", n, err, f.rt.Len(), f.records(t))
		}
		time.Sleep(time.Hour)
		if f.rt.Len() != 0 {
			t.Error("the pool was filled again")
		}
	})
}
