package sandbox_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
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

// A start takes an entry, which then is the sandbox of its tenant, and the pool is filled again. Until then, nothing shows the entry.
func TestStartFromPool(t *testing.T) {
	withPool(t, 1, 1, func(t *testing.T, f *poolFixture) {
		ids := f.entries(t)
		if len(ids) != 1 || f.rt.Len() != 1 || f.rt.Hostname(ids[0]) != DefaultHostname {
			t.Fatalf("the pool has the entries %v", ids)
		}
		if n := len(f.List("")); n != 0 || f.InUse() != (Quota{}) || f.Room().Booting != 0 {
			t.Errorf("the entry counts as one of %d sandboxes, %+v", n, f.InUse())
		}
		all, err := f.Metrics(t.Context(), nil, "")
		if err != nil || len(all) != 0 {
			t.Errorf("metrics: %+v, error %v", all, err)
		}
		time.Sleep(time.Hour)
		now := time.Now()
		env := []string{"A=b"}
		rec := f.start(t, "one", Request{Env: env})
		synctest.Wait()
		if n := len(f.entries(t)); n != 0 || f.status(t).Filling {
			t.Errorf("the pool is filled again at once, beside the first run: %d entries", n)
		}
		want := Record{
			ID: ids[0], Name: testName, State: Running, CreatedAt: now.UTC(), Origin: Origin{From: FromPool}, CPUNanos: int64(time.Second),
			Config: Config{Template{"default", 1, 512, 1024}, Binding{Env: env, Hostname: DefaultHostname}},
		}
		if fmt.Sprintf("%+v", rec) != fmt.Sprintf("%+v", want) {
			t.Errorf("the record is\n%+v\nwant\n%+v", rec, want)
		}
		if stored := f.store.Records()[rec.ID]; fmt.Sprintf("%+v", stored) != fmt.Sprintf("%+v", want) {
			t.Errorf("the stored record is\n%+v\nwant\n%+v", stored, want)
		}
		if f.InUse().Sandboxes != 1 {
			t.Errorf("in use: %+v", f.InUse())
		}
		if _, err := sandboxtest.Read(f.RunCode(t.Context(), testName, Code{Language: Python, Text: "1"})); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Second)
		if all, err := f.Metrics(t.Context(), nil, ""); err != nil || len(all) != 1 || *all[0].CPUPercent != 0 {
			t.Errorf("metrics: %+v, error %v; what the microVM used before the start must not count", all, err)
		}
		if again := f.entries(t); len(again) != 1 || again[0] == ids[0] {
			t.Errorf("after the start, the pool has the entries %v", again)
		}
		entries := []EntryStatus{{f.entries(t)[0], now.Add(refillDelay).UTC(), time.Second, 5 << 20}}
		if s := f.status(t); s.Hits != 1 || s.Misses != 0 || s.Ready != 1 || fmt.Sprint(s.Entries) != fmt.Sprint(entries) {
			t.Errorf("status: %+v", s)
		}
		f.rt.Kill(rec.ID) // is watched
		synctest.Wait()
		if rec, _ := f.Get(testName); rec.State != Failed {
			t.Errorf("after its microVM ended, the sandbox is %+v", rec)
		}
	})
}

// An entry runs a command, starts interpreters, and runs code in them. A command that the image does not have is no error.
func TestPoolWarmsItsEntries(t *testing.T) {
	withPool(t, 1, 1, func(t *testing.T, f *poolFixture) {
		var did []string
		f.pause()
		f.guest.OnRun = func(_ context.Context, run any) error {
			if code, ok := run.(Code); ok {
				did = append(did, fmt.Sprintf("%s(%s,%t)", code.Language, code.Text, code.Rehearsal))
				return nil
			}
			did = append(did, run.(Command).Program)
			return fmt.Errorf("true: %w", ErrCommandNotFound)
		}
		f.onWarm.set(func(_ context.Context, languages string) error {
			did = append(did, languages)
			return nil
		})
		f.reopen(t, 2, 2)
		if got := strings.Join(did, " "); got != "true [python nodejs] python(1 + 1,true) nodejs(1 + 1,true)" || len(f.entries(t)) != 2 {
			t.Errorf("the pool did %q, and has %d entries", got, len(f.entries(t)))
		}
	})
}

// What a start asks for beyond its environment is done in the microVM that it takes, before the start ends.
func TestBindingOfAnEntry(t *testing.T) {
	withPool(t, 1, 1, func(t *testing.T, f *poolFixture) {
		cold := 0
		f.onWarm.set(func(_ context.Context, languages string) error {
			if languages == "[]" {
				cold++
			}
			return nil
		})
		rec := f.start(t, "one", Request{Hostname: "web", Workdir: "/work", User: "app"})
		if rec.Origin.From != FromPool || f.rt.Hostname(rec.ID) != "web" || cold != 1 {
			t.Errorf("hostname %q, origin %+v, interpreters discarded %d times", f.rt.Hostname(rec.ID), rec.Origin, cold)
		}
		f.awaitRefill()
		// What the sandbox refuses.
		err := f.Start(t.Context(), Name{"default", "two"}, Request{Workdir: "/etc/passwd/x"})
		if !errdefs.IsInvalidArgument(err) || len(f.List("")) != 1 {
			t.Errorf("a workdir that cannot be: %v, sandboxes %+v", err, f.List(""))
		}
		// What fails.
		for what, hook := range map[string]*hook{"hostname": &f.onSetHostname, "portal": &f.onWarm} {
			f.awaitRefill()
			ids := f.entries(t)
			hook.set(func(_ context.Context, languages string) error {
				if strings.Contains(languages, "python") {
					return nil // a refill
				}
				return errors.New("it broke")
			})
			err := f.Start(t.Context(), Name{"default", what}, Request{Hostname: "web", Workdir: "/work"})
			hook.unset()
			rec, _ := f.Get(Name{"default", what})
			if !errdefs.IsUnavailable(err) || rec.State != Failed || rec.Cause != "it broke" || !slices.Contains(ids, rec.ID) {
				t.Errorf("%s: error %v, record %+v, entries before %v", what, err, rec, ids)
			}
			f.awaitRefill()
			if again := f.entries(t); len(again) != 1 || slices.Contains(again, rec.ID) {
				t.Errorf("%s: the pool has the entries %v", what, again)
			}
		}
		if f.rt.Len() != 2 { // the sandbox and an entry
			t.Errorf("%d microVMs are left", f.rt.Len())
		}
	})
}

// A start takes an entry whichever way it, the server's settings or SetPool name the image. The sandbox has the name that its start
// gave.
func TestPoolKnowsAllNamesOfAnImage(t *testing.T) {
	withPool(t, 1, 1, func(t *testing.T, f *poolFixture) {
		for i, name := range []string{"", "default:latest", "docker.io/library/default", "index.docker.io/library/default:latest"} {
			rec := f.start(t, fmt.Sprint("s", i), Request{Image: name})
			if rec.Origin.From != FromPool || rec.Config.Image != cmp.Or(name, "default") {
				t.Errorf("image %q: origin %+v, config %+v", name, rec.Origin, rec.Config)
			}
			f.awaitRefill()
		}
		for _, name := range []string{"default:1", "example.com/default", "other/default", "Default"} {
			if rec := f.start(t, "other", Request{Image: name}); rec.Origin.From != Cold {
				t.Errorf("image %q: origin %+v", name, rec.Origin)
			}
			if err := f.Stop(t.Context(), Name{"default", "other"}); err != nil {
				t.Fatal(err)
			}
		}
		for name, want := range map[string]string{"docker.io/library/default:latest": "default", "docker.io/team/other:latest": "team/other"} {
			if size, err := f.SetPool(t.Context(), Request{Image: name}, 1, 2); err != nil || size.Image != want {
				t.Errorf("image %q: set %+v, error %v", name, size, err)
			}
		}
		synctest.Wait()
		if s := f.PoolStatus(); len(s.Templates) != 2 || s.Templates[0].Max != 2 || s.Templates[0].Hits != 4 || s.Templates[1].Ready != 1 {
			t.Errorf("status: %+v", s)
		}
		if rec := f.start(t, "team", Request{Image: "docker.io/team/other"}); rec.Origin.From != FromPool {
			t.Errorf("origin %+v", rec.Origin)
		}
	})
}

// A start takes no entry of another image or size, of an image that was replaced, or that has ended. The record says why.
func TestStartMissesThePool(t *testing.T) {
	withPool(t, 1, 2, func(t *testing.T, f *poolFixture) {
		for _, req := range []Request{{Image: "other"}, {CPUs: 2}, {MemoryMiB: 600}, {DiskMiB: 2048}} {
			rec := f.start(t, "one", req)
			if o := rec.Origin; o.From != Cold || o.Why != "the pool has no microVMs of this image and size; this runtime has no templates" {
				t.Errorf("%+v: origin %+v", req, o)
			}
			if err := f.Stop(t.Context(), testName); err != nil {
				t.Fatal(err)
			}
		}
		if s := f.status(t); s.Hits != 0 || s.Misses != 0 {
			t.Errorf("status: %+v", s)
		}
		f.pause() // the loop does not notice in time
		ids := f.entries(t)
		f.rt.ReplaceImage("default", "sha256:new")
		if rec := f.start(t, "one", Request{}); rec.Origin.From != Cold || rec.Origin.Why != "the pool had no microVM ready; this runtime has no templates" {
			t.Errorf("replaced image: origin %+v", rec.Origin)
		}
		f.reopen(t, 1, 2)
		if again := f.entries(t); len(again) != 1 || slices.Equal(again, ids) {
			t.Errorf("the pool has the entries %v, and had %v", again, ids)
		}
		// One that has ended: the next one is taken.
		if _, err := f.SetPool(t.Context(), Request{}, 2, 2); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		ids = f.entries(t)
		f.pause()
		f.rt.Kill(ids[0])
		synctest.Wait() // the loop does not run, so nothing removes the entry
		rec := f.start(t, "two", Request{})
		if rec.Origin.From != FromPool || rec.ID != ids[1] {
			t.Errorf("origin %+v, id %s, entries %v", rec.Origin, rec.ID, ids)
		}
	})
}

// The quota counts when an entry is taken. A start that is over it takes none.
func TestQuotaAppliesToStartsFromThePool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &poolFixture{fixture: newFixture(t)}
		f.restartWith(t, func(o *Options) {
			o.Pool = PoolOptions{Min: 2, Max: 2, MemoryMiB: 4096}
			o.Quota = func(string) Quota { return Quota{Sandboxes: 1} }
		})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { f.RunPool(ctx) })
		synctest.Wait()
		f.start(t, "one", Request{})
		if err := f.Start(t.Context(), Name{"default", "two"}, Request{}); !errdefs.IsResourceExhausted(err) {
			t.Errorf("a start over the quota: %v", err)
		}
		f.awaitRefill()
		if len(f.entries(t)) != 2 || f.status(t).Hits != 1 {
			t.Errorf("entries %v, status %+v", f.entries(t), f.status(t))
		}
		cancel()
		wg.Wait()
		f.Manager.Close()
	})
}

// The pool grows with the number of starts, up to its largest size, and shrinks again.
func TestPoolFollowsTheDemand(t *testing.T) {
	withPool(t, 1, 3, func(t *testing.T, f *poolFixture) {
		for i := range 5 {
			f.start(t, fmt.Sprint("s", i), Request{})
			f.awaitRefill()
		}
		if n := len(f.entries(t)); n != 3 {
			t.Errorf("after five starts, the pool has %d entries", n)
		}
		time.Sleep(6 * time.Minute) // a half of the demand is left
		if n := len(f.entries(t)); n != 2 {
			t.Errorf("after six minutes, the pool has %d entries", n)
		}
		time.Sleep(time.Hour)
		if n := len(f.entries(t)); n != 1 || f.rt.Len() != 5+1 {
			t.Errorf("after an hour, the pool has %d entries, and %d microVMs are left", n, f.rt.Len())
		}
	})
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

// A refill that fails is tried again, each time after twice the time. It leaves nothing.
func TestRefillBacksOff(t *testing.T) {
	withPool(t, 1, 1, func(t *testing.T, f *poolFixture) {
		f.pause()
		var at []time.Duration
		began := time.Now()
		f.onStart.set(func(context.Context, string) error {
			at = append(at, time.Since(began).Round(time.Second))
			return errors.New("no such luck")
		})
		began = time.Now()
		f.reopen(t, 2, 2)
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		want := "[0s 1s 3s 7s 15s 31s 1m3s 2m7s 4m15s 8m31s 13m31s 18m31s]"
		if s := f.status(t); fmt.Sprint(at) != want || s.Failures != uint64(len(at)) || s.LastError != "no such luck" || s.Waits == "" || s.RetryAt.IsZero() {
			t.Errorf("refills at %v, want %s; status %+v", at, want, s)
		}
		if f.rt.Len() != 1 || len(f.records(t)) != 1 {
			t.Errorf("%d microVMs and %d records are left", f.rt.Len(), len(f.records(t)))
		}
		f.onStart.unset()
		time.Sleep(5 * time.Minute)
		if s := f.status(t); s.Ready != 2 || s.LastError != "" || s.Waits != "" || !s.RetryAt.IsZero() {
			t.Errorf("status: %+v", s)
		}
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

// While a tenant's start is in progress, the pool starts nothing. After it, the pool is filled at once.
func TestStartsGoBeforeRefills(t *testing.T) {
	withPool(t, 1, 1, func(t *testing.T, f *poolFixture) {
		f.onStart.set(func(context.Context, string) error { time.Sleep(10 * time.Second); return nil })
		var wg sync.WaitGroup
		wg.Go(func() { f.start(t, "other", Request{Image: "other"}) })
		synctest.Wait()
		f.start(t, "one", Request{})
		time.Sleep(9 * time.Second)
		if s := f.status(t); s.Filling || s.Ready != 0 || s.Waits != "starts of sandboxes go first" {
			t.Errorf("while a sandbox starts: %+v", s)
		}
		wg.Wait()
		synctest.Wait()
		if s := f.status(t); !s.Filling {
			t.Errorf("after the start: %+v", s)
		}
		if f.Room().Booting != 0 {
			t.Error("the refill counts as a start")
		}
		time.Sleep(11 * time.Second)
		if s := f.status(t); s.Ready != 1 || s.Filling || s.Waits != "" {
			t.Errorf("after the refill: %+v", s)
		}
	})
}

// A refill needs memory like a start, and has a budget. A start that lacks memory gets that of the pool: of its entries, and of the
// refill in progress.
func TestMemoryOfThePool(t *testing.T) {
	for _, filling := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			base, h := newRoomFixture(t, 512*mib+1100*mib, 512*mib) // the reserve is 512 MiB
			f := &poolFixture{fixture: base}
			f.reopen(t, 3, 3)
			time.Sleep(11 * time.Second)
			if s := f.status(t); s.Ready != 1 || !s.Filling {
				t.Fatalf("status: %+v", s)
			}
			if !filling {
				time.Sleep(10 * time.Second)
				if s := f.status(t); s.Ready != 2 || s.Waits != "the host has 76 MiB of free memory for sandboxes, and 512 MiB are needed" {
					t.Fatalf("status: %+v", s)
				}
			}
			began := time.Now()
			rec := f.start(t, "big", Request{MemoryMiB: 1000})
			if took := time.Since(began); took != 10*time.Second || rec.Origin.From != Cold {
				t.Errorf("the start took %s, origin %+v", took, rec.Origin)
			}
			if n := len(f.entries(t)); n != 0 || f.rt.Len() != 1 || len(f.records(t)) != 1 {
				t.Errorf("%d entries, %d microVMs, %d records", n, f.rt.Len(), len(f.records(t)))
			}
			if err := f.Stop(t.Context(), Name{"default", "big"}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(30 * time.Second)
			if s := f.status(t); s.Ready != 0 || s.Waits != "sandboxes needed the memory of the pool" {
				t.Errorf("status: %+v", s)
			}
			time.Sleep(2 * time.Minute)
			if s := f.status(t); s.Ready != 2 || s.Failures != 0 {
				t.Errorf("status: %+v", s)
			}
			f.pause()
			h.use("someone else", 0)
			f.restartWith(t, func(o *Options) { o.Pool = PoolOptions{Min: 3, Max: 3, MemoryMiB: 600} })
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() { f.RunPool(ctx) })
			time.Sleep(time.Minute)
			if s := f.PoolStatus(); s.MemoryMiB != 512 || s.MaxMemoryMiB != 600 || s.Templates[0].Waits != "the entries may have 600 MiB of memory together" {
				t.Errorf("status: %+v", s)
			}
			cancel()
			wg.Wait()
			f.cancel = nil
			f.Manager.Close()
		})
	}
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
