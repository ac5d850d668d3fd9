package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	. "github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/randtest"
)

const mib, gib = uint64(1) << 20, uint64(1) << 30

// hostMemory is the memory of a host with microVMs.
type hostMemory struct {
	total uint64
	mu    sync.Mutex
	used  map[string]uint64 // by the id of the microVM
}

func (h *hostMemory) measure() (available, total uint64, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	available = h.total
	for _, n := range h.used {
		available -= min(available, n)
	}
	return available, h.total, nil
}

func (h *hostMemory) use(id string, n uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.used[id] = n
}

// newRoomFixture returns a fixture on a host with this memory. A boot takes ten seconds, and its guest then uses bootUses.
func newRoomFixture(t *testing.T, total, bootUses uint64) (*fixture, *hostMemory) {
	f, h := newFixture(t), &hostMemory{total: total, used: map[string]uint64{}}
	f.memory = h.measure
	f.rt.OnStart = func(ctx context.Context, id string) error {
		select {
		case <-time.After(10 * time.Second):
			h.use(id, bootUses)
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	f.rt.OnRemove = func(_ context.Context, id string) error {
		h.use(id, 0)
		return nil
	}
	return f, h
}

func wantRefusal(t *testing.T, err error, text string, retryAfter time.Duration) {
	t.Helper()
	refusal, ok := errors.AsType[*Refusal](err)
	if !ok || !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), text) || refusal.RetryAfter != retryAfter {
		t.Errorf("got error %v (%+v), want a refusal with %q and retry after %s", err, refusal, text, retryAfter)
	}
}

// A sandbox needs its memory of what the host has available, less a reserve. If nothing can free memory soon, the start is refused
// at once, and leaves nothing. Starting a running sandbox again needs no memory.
func TestStartNeedsMemoryOfTheHost(t *testing.T) {
	f := newFixture(t)
	available := 20 * gib
	f.memory = func() (uint64, uint64, error) { return available, 20 * gib, nil } // the reserve is 1 GiB
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Fatal(err)
	}
	failed := Name{"failed", "one"}
	f.rt.OnStart = func(context.Context, string) error { return errors.New("it broke") }
	if err := f.Start(t.Context(), failed, Request{}); !errdefs.IsUnavailable(err) {
		t.Fatal(err)
	}
	f.rt.OnStart = nil
	available = gib + 300*mib
	if err := f.Start(t.Context(), testName, Request{}); err != nil {
		t.Errorf("starting it again: %v", err)
	}
	other := Name{"other", "two"}
	wantRefusal(t, f.Start(t.Context(), other, Request{}),
		"the server has 300 MiB of free memory for sandboxes, and this sandbox needs 512 MiB; stop sandboxes, or try again later", 5*time.Second)
	if err := f.Start(t.Context(), failed, Request{}); !errdefs.IsResourceExhausted(err) || f.List("failed")[0].State != Failed {
		t.Errorf("start of a failed sandbox: %v, %+v", err, f.List("failed"))
	}
	if len(f.List("other")) != 0 || len(f.records(t)) != 2 || f.rt.Len() != 1 || f.InUse().Sandboxes != 1 {
		t.Errorf("the refused start left %+v", f.List(""))
	}
	if r := f.Room(); r.MemoryBytes == nil || *r.MemoryBytes != 300*mib || r.Booting != 0 || r.Waiting != 0 {
		t.Errorf("room: %+v", r)
	}
	if err := f.Start(t.Context(), other, Request{MemoryMiB: 300}); err != nil {
		t.Errorf("a sandbox that fits: %v", err)
	}

	// A small host keeps 512 MiB. More than the rest of it never fits, so trying again does not help.
	f.memory = func() (uint64, uint64, error) { return gib, gib, nil }
	wantRefusal(t, f.Start(t.Context(), Name{"other", "three"}, Request{MemoryMiB: 513}),
		"the server has at most 512 MiB of memory for sandboxes, and this sandbox needs 513 MiB; ask for less memory", 0)
	if err := f.Start(t.Context(), Name{"other", "three"}, Request{MemoryMiB: 512}); err != nil {
		t.Error(err)
	}

	f.memory = func() (uint64, uint64, error) { return 0, 0, errors.New("no such file /proc/meminfo") }
	if err := f.Start(t.Context(), Name{"other", "four"}, Request{}); err == nil || errdefs.IsResourceExhausted(err) {
		t.Errorf("if the memory cannot be measured: %v", err)
	}
	if r := f.Room(); r.MemoryBytes != nil {
		t.Errorf("room: %+v, want no memory", r)
	}
}

// A start waits for memory while another start is in progress, whose guest may use less than it may have. When nothing is in
// progress any more, it is refused, and leaves nothing.
func TestStartWaitsForMemoryOfStarts(t *testing.T) {
	for _, c := range []struct {
		uses uint64
		fits bool
	}{{200 * mib, true}, {512 * mib, false}} {
		synctest.Test(t, func(t *testing.T) {
			f, _ := newRoomFixture(t, 512*mib+800*mib, c.uses) // the reserve is 512 MiB
			began := time.Now()
			var wg sync.WaitGroup
			wg.Go(func() {
				if err := f.Start(t.Context(), Name{"default", "one"}, Request{}); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
			wg.Go(func() {
				err := f.Start(t.Context(), Name{"default", "two"}, Request{})
				if c.fits && (err != nil || time.Since(began) != 20*time.Second) {
					t.Errorf("the second start ended after %s with error %v", time.Since(began), err)
				}
				if !c.fits {
					wantRefusal(t, err, "the server has 288 MiB of free memory", 5*time.Second)
				}
			})
			synctest.Wait()
			if r := f.Room(); *r.MemoryBytes != 288*mib || r.Booting != 1 || r.Waiting != 1 {
				t.Errorf("room: %+v with %d bytes, want 288 MiB, one start in progress and one that waits", r, *r.MemoryBytes)
			}
			wg.Wait()
			if n := len(f.records(t)); !c.fits && (n != 1 || len(f.List("")) != 1) {
				t.Errorf("the refused start left a record: %+v", f.List(""))
			}
			f.Manager.Close()
		})
	}
}

// slowStops takes two seconds to record that a sandbox is being stopped.
type slowStops struct{ Store }

func (s slowStops) PutSandbox(rec Record) error {
	if rec.State == Stopping {
		time.Sleep(2 * time.Second)
	}
	return s.Store.PutSandbox(rec)
}

// A start waits for the memory of a sandbox that is being stopped, that has crashed, or whose start has failed, until it is removed.
func TestStartWaitsForMemoryOfRemovals(t *testing.T) {
	for what, c := range map[string]struct {
		fails bool
		end   func(f *fixture) // of the first sandbox, if its start does not fail
		after time.Duration    // when the second start begins, after the begin of the first one or after end
		waits time.Duration
	}{
		"stop":                 {false, func(f *fixture) { _ = f.Stop(context.Background(), testName) }, time.Second, 4 * time.Second},
		"crash":                {false, func(f *fixture) { f.rt.Kill(f.List("")[0].ID) }, time.Second, 2 * time.Second},
		"failed start":         {true, nil, 11 * time.Second, 2 * time.Second},
		"start that will fail": {true, nil, 4 * time.Second, 9 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			f, h := newRoomFixture(t, gib, 512*mib)
			f.restartWith(t, func(o *Options) { o.Store = slowStops{f.store} })
			f.rt.OnRemove = func(_ context.Context, id string) error {
				time.Sleep(3 * time.Second)
				h.use(id, 0)
				return nil
			}
			boot, boots := f.rt.OnStart, 0
			f.rt.OnStart = func(ctx context.Context, id string) error {
				boots++
				if err := boot(ctx, id); err != nil || boots > 1 || !c.fails {
					return err
				}
				return errors.New("it broke")
			}
			var wg sync.WaitGroup
			first := func() {
				if err := f.Start(t.Context(), testName, Request{}); (err != nil) != c.fails {
					t.Errorf("%s: the first start: %v", what, err)
				}
			}
			if c.fails {
				wg.Go(first)
			} else {
				first()
				wg.Go(func() { c.end(f) })
			}
			time.Sleep(c.after)
			began := time.Now()
			err := f.Start(t.Context(), Name{"default", "two"}, Request{})
			if took, want := time.Since(began), c.waits+10*time.Second; err != nil || took != want {
				t.Errorf("%s: the second start ended after %s with error %v, want %s", what, took, err, want)
			}
			wg.Wait()
			f.Manager.Close()
		})
	}
}

// A stop that waits for the end of a start frees no memory that the start could wait for.
func TestStartDoesNotWaitForItsOwnStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.rt.OnStart = func(context.Context, string) error { return errors.New("it broke") }
		if err := f.Start(t.Context(), testName, Request{}); err == nil {
			t.Fatal("the sandbox started")
		}
		f.rt.OnRemove = func(context.Context, string) error { time.Sleep(2 * time.Second); return nil }
		f.memory = func() (uint64, uint64, error) { return gib, 20 * gib, nil } // all of it is the reserve
		began := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() { // first removes what the failed start left
			wantRefusal(t, f.Start(t.Context(), testName, Request{}), "the server has 0 MiB of free memory", 5*time.Second)
			if took := time.Since(began); took != 2*time.Second {
				t.Errorf("the start was refused after %s, want 2s", took)
			}
		})
		time.Sleep(time.Second)
		if err := f.Stop(t.Context(), testName); err != nil || len(f.List("")) != 0 {
			t.Errorf("stop: %v; sandboxes: %+v", err, f.List(""))
		}
		wg.Wait()
		f.Manager.Close()
	})
}

// A small sandbox does not overtake a big one that waits for memory. When the big one gives up, the small one starts at once.
func TestBigStartIsNotOvertaken(t *testing.T) {
	for _, canceled := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			f, _ := newRoomFixture(t, 512*mib+2200*mib, 200*mib)
			var wg sync.WaitGroup
			began := time.Now()
			ended := map[string]time.Duration{}
			var mu sync.Mutex
			start := func(ctx context.Context, name string, memory int) {
				wg.Go(func() {
					err := f.Start(ctx, Name{"default", name}, Request{MemoryMiB: memory})
					if err != nil && ctx.Err() == nil {
						t.Errorf("%s: %v", name, err)
					}
					mu.Lock()
					defer mu.Unlock()
					ended[name] = time.Since(began)
				})
				synctest.Wait()
			}
			start(t.Context(), "first", 1000)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			start(ctx, "big", 2000)
			start(t.Context(), "small", 128)
			time.Sleep(5 * time.Second)
			if canceled {
				cancel()
			}
			wg.Wait()
			want := map[string]time.Duration{"first": 10, "big": 20, "small": 30}
			if canceled {
				want = map[string]time.Duration{"first": 10, "big": 5, "small": 15}
			}
			for name, at := range want {
				if ended[name] != at*time.Second {
					t.Errorf("the start of %s ended after %s, want %s", name, ended[name], at*time.Second)
				}
			}
			f.Manager.Close()
		})
	}
}

// The wait of a start counts towards its time limit. At its end, the start is refused and leaves nothing. If it got its turn before,
// its boot has only the rest.
func TestWaitCountsTowardsTheTimeLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.restartWith(t, func(o *Options) { o.Boots = 1 })
		boots := 0
		f.rt.OnStart = func(ctx context.Context, _ string) error {
			if boots++; boots == 1 {
				time.Sleep(70 * time.Second) // beyond its time limit
			}
			<-ctx.Done()
			return ctx.Err()
		}
		var wg sync.WaitGroup
		start := func(name string, check func(error)) {
			wg.Go(func() {
				began := time.Now()
				err := f.Start(t.Context(), Name{"default", name}, Request{})
				if took := time.Since(began); took != time.Minute && name != "one" {
					t.Errorf("the start of %s took %s, want its time limit of 1m", name, took)
				}
				check(err)
			})
			time.Sleep(5 * time.Second)
		}
		slow := func(err error) {
			if !errdefs.IsUnavailable(err) {
				t.Errorf("got error %v, want Unavailable", err)
			}
		}
		start("one", slow)
		start("two", func(err error) { // waits until its time limit, 65 s after the first start
			wantRefusal(t, err, "the start of sandbox default/two waited 1m0s for other starts, which is its time limit; try again later", 5*time.Second)
		})
		time.Sleep(10 * time.Second)
		start("three", slow) // boots from 70 s to 80 s after the first start
		wg.Wait()
		if boots != 2 || len(f.List("")) != 2 || f.List("")[0].Name.Name != "one" || f.List("")[1].Name.Name != "three" {
			t.Errorf("%d microVMs booted, and there are the records %+v", boots, f.List(""))
		}
		f.Manager.Close()
	})
}

// Whatever starts, fails, is stopped and is canceled at the same time: no more than Boots microVMs boot at once, the memory of the
// running sandboxes and what those that start may have fits into the host, and all starts end.
func TestManyStartsAndStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rnd := randtest.New(t)
		const boots, total, reserve = 3, 16 << 30, 16 << 30 / 20
		f := newFixture(t)
		f.restartWith(t, func(o *Options) { o.Boots, o.StartTimeout = boots, 100*time.Hour })
		h := &hostMemory{total: total, used: map[string]uint64{}}
		f.memory = h.measure
		var mu sync.Mutex // guards rnd and booting
		random := func(n int) int {
			mu.Lock()
			defer mu.Unlock()
			return rnd.IntN(n)
		}
		booting := map[string]uint64{}
		check := func() {
			sum := uint64(reserve)
			for _, n := range booting {
				sum += n
			}
			for _, n := range h.used {
				sum += n
			}
			if len(booting) > boots || sum > total {
				t.Errorf("%d microVMs boot; %d of %d MiB are in use or reserved", len(booting), sum/mib, total/mib)
			}
		}
		var most, refused, started int
		f.rt.OnStart = func(ctx context.Context, id string) error {
			var memory uint64
			for _, rec := range f.List("") {
				if rec.ID == id {
					memory = uint64(rec.Config.MemoryMiB) * mib
				}
			}
			mu.Lock()
			booting[id] = memory
			most = max(most, len(booting))
			h.mu.Lock()
			check()
			h.mu.Unlock()
			mu.Unlock()
			select {
			case <-time.After(time.Duration(1+random(5000)) * time.Millisecond):
			case <-ctx.Done():
			}
			mu.Lock()
			defer mu.Unlock()
			h.mu.Lock()
			defer h.mu.Unlock()
			h.used[id] = memory / uint64(1+rnd.IntN(4))
			delete(booting, id)
			check()
			if ctx.Err() == nil && rnd.IntN(10) == 0 {
				return errors.New("it broke")
			}
			return ctx.Err()
		}
		f.rt.OnRemove = func(_ context.Context, id string) error {
			time.Sleep(time.Duration(random(500)) * time.Millisecond)
			h.use(id, 0)
			return nil
		}
		began := time.Now()
		var wg sync.WaitGroup
		for worker := range 40 {
			name := Name{string(rune('a' + worker%4)), fmt.Sprint("n", worker)}
			wg.Go(func() {
				for range 30 {
					ctx, cancel := context.WithCancel(t.Context())
					if random(10) == 0 {
						time.AfterFunc(time.Duration(random(5000))*time.Millisecond, cancel)
					}
					if random(5) == 0 {
						wg.Go(func() {
							time.Sleep(time.Duration(random(5000)) * time.Millisecond)
							_ = f.Stop(t.Context(), name)
						})
					}
					err := f.Start(ctx, name, Request{MemoryMiB: 128 + random(3900)})
					mu.Lock()
					if errdefs.IsResourceExhausted(err) {
						refused++
					} else if err == nil {
						started++
					}
					mu.Unlock()
					cancel()
					time.Sleep(time.Duration(random(3000)) * time.Millisecond)
					_ = f.Stop(t.Context(), name)
				}
			})
		}
		wg.Wait()
		if took := time.Since(began); took > 50*time.Hour {
			t.Errorf("the starts took %s: one of them ended only by its time limit", took)
		}
		if r := f.Room(); r.Booting != 0 || r.Waiting != 0 || len(f.List("")) != 0 {
			t.Errorf("at the end: %+v, sandboxes %+v", r, f.List(""))
		}
		if most != boots || started < 100 {
			t.Errorf("at most %d microVMs booted at once, %d starts succeeded and %d were refused", most, started, refused)
		}
		f.Manager.Close()
	})
}

// The build of a template begins only with memory and disk space that starts do not need, and not while a start waits. A start that
// lacks its memory ends it, and waits until it has ended.
func TestAdmitTemplate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, h := newRoomFixture(t, 512*mib+1100*mib, 512*mib) // the reserve is 512 MiB
		refused := func(memoryMiB int, text string) {
			t.Helper()
			if _, _, err := f.AdmitTemplate(t.Context(), memoryMiB); err == nil || !strings.Contains(err.Error(), text) {
				t.Errorf("a build with %d MiB: %v, want %q", memoryMiB, err, text)
			}
		}
		refused(1101, "the host has 1100 MiB of free memory for sandboxes, and 1101 MiB are needed")
		f.disk.free = 255 * mib
		refused(512, "with a template of up to 256 MiB, the server's disk is almost full")
		f.disk.free = 256 * mib

		// Beside a start, whose memory it does not take.
		var starts sync.WaitGroup
		starts.Go(func() {
			if err := f.Start(t.Context(), testName, Request{MemoryMiB: 512}); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		refused(600, "the host has 588 MiB of free memory")
		ctx, end, err := f.AdmitTemplate(t.Context(), 512)
		if err != nil {
			t.Fatal(err)
		}
		refused(100, "the host has 76 MiB of free memory")
		starts.Wait()
		if ctx.Err() != nil {
			t.Error("a start that had its memory has ended the build")
		}

		// A start that lacks the memory.
		h.use("build", 100*mib)
		began := time.Now()
		go func() {
			<-ctx.Done()
			if cause := context.Cause(ctx); cause != ErrGivenUp {
				t.Errorf("the build ended because of %v", cause)
			}
			refused(1, "starts of sandboxes go first")
			time.Sleep(time.Second)
			h.use("build", 0)
			end()
		}()
		if err := f.Start(t.Context(), Name{"default", "two"}, Request{MemoryMiB: 512}); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took != 11*time.Second {
			t.Errorf("the start took %s, want that it begins when the build has ended", took)
		}
		if free := *f.Room().MemoryBytes; free != 76*mib {
			t.Errorf("%d MiB are free", free/mib)
		}
		_, end, err = f.AdmitTemplate(t.Context(), 76)
		if err != nil {
			t.Fatal(err)
		}
		end()
	})
}
