package sandbox_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
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
