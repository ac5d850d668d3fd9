package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	. "github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

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

// The rehearsal of a template runs a command, starts no interpreter, and disconnects.
func TestRehearseTemplate(t *testing.T) {
	f := newFixture(t)
	var did []any
	f.guest.OnRun = func(_ context.Context, run any) error {
		did = append(did, run)
		return nil
	}
	f.guest.OnWarm = func(context.Context, []Language) error { return errors.New("interpreters were started") }
	msbd, portal := net.Pipe()
	if err := f.RehearseTemplate(t.Context(), msbd, "/portal"); err != nil || len(did) != 1 || did[0].(Command).Program != "/portal" {
		t.Errorf("the rehearsal did %v, %v, want one command", did, err)
	}
	if _, err := portal.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the rehearsal, the portal reads %v, want io.EOF", err)
	}
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
