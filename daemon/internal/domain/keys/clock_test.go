package keys

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/sys/randtest"
)

const year = 365 * 24 * time.Hour

func TestClockNeverGoesBack(t *testing.T) {
	t.Parallel()
	m := newManualClock("2026-01-10T10:00:00Z")
	c := newClock(m.read, m.slept)
	c.accept()
	start := m.now()
	expect := func(want time.Time, behind time.Duration) {
		t.Helper()
		if got := c.time(); !got.Equal(want) {
			t.Errorf("the time is %s, want %s", got, want)
		}
		if got := c.behind(); got != behind {
			t.Errorf("the wall clock is %s behind, want %s", got, behind)
		}
	}
	expect(start, 0)
	m.pass(time.Hour)
	expect(start.Add(time.Hour), 0)
	m.set(start) // an hour back
	expect(start.Add(time.Hour), time.Hour)
	m.pass(time.Minute)
	expect(start.Add(61*time.Minute), time.Hour)
	m.set(start.Add(57 * time.Minute)) // 4 minutes behind, within maxCorrection
	expect(start.Add(61*time.Minute), 0)
	m.set(start.Add(65 * time.Minute)) // 4 minutes ahead, within maxCorrection
	expect(start.Add(65*time.Minute), 0)
	c.advance(start.Add(2 * time.Hour))
	m.set(start.Add(2 * time.Hour))
	expect(start.Add(2*time.Hour), 0)
	c.advance(start.Add(time.Hour)) // an earlier time changes nothing
	expect(start.Add(2*time.Hour), 0)
	c.advance(start.Add(2*time.Hour + maxCorrection))
	expect(start.Add(2*time.Hour+maxCorrection), 0)
	c.advance(start.Add(2*time.Hour + maxCorrection + time.Millisecond))
	expect(start.Add(2*time.Hour+maxCorrection+time.Millisecond), maxCorrection+time.Millisecond)
	far := time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)
	c.advance(far)
	expect(far, time.Duration(math.MaxInt64/1000)*1000)
	c.accept()
	expect(start.Add(2*time.Hour), 0)
	m.set(time.Date(1901, 1, 1, 0, 0, 0, 999_999, time.UTC))
	c.accept()
	expect(time.Date(1901, 1, 1, 0, 0, 0, 0, time.UTC), 0)
}

// A wall clock that is set far forward is followed only once it has stayed there. The time in which the machine was
// suspended is followed at once.
func TestClockWaitsWhetherTheWallClockStaysAhead(t *testing.T) {
	t.Parallel()
	m := newManualClock("2026-01-10T10:00:00Z")
	c := newClock(m.read, m.slept)
	c.advance(m.now()) // as from the store
	start := m.now()
	expect := func(what string, want time.Time, ahead, behind time.Duration) {
		t.Helper()
		c.observe() // as Run does
		if got := c.time(); !got.Equal(want) {
			t.Errorf("%s: the time is %s, want %s", what, got, want)
		}
		if got, wait := c.ahead(); got != ahead || (wait > 0) != (ahead > 0) || wait > confirmation {
			t.Errorf("%s: the wall clock is %s ahead, to be confirmed in %s; want %s", what, got, wait, ahead)
		}
		if got := c.behind(); got != behind {
			t.Errorf("%s: the wall clock is %s behind, want %s", what, got, behind)
		}
		if trusted := c.trustedTime(); !trusted.Equal(c.time()) {
			t.Errorf("%s: the time to remember is %s, the time is %s", what, trusted, c.time())
		}
	}
	m.set(start.Add(maxCorrection + time.Millisecond))
	expect("just ahead", start, maxCorrection+time.Millisecond, 0)
	m.set(start.Add(12 * year))
	expect("12 years ahead", start, 12*year, 0)
	m.pass(confirmation - time.Microsecond)
	expect("almost confirmed", start.Add(confirmation-time.Microsecond).Truncate(time.Millisecond), 12*year, 0)
	m.set(start.Add(confirmation))
	start = m.now()
	expect("set back", start, 0, 0)
	m.pass(time.Hour)
	start = m.now()
	expect("an hour later", start, 0, 0)

	m.set(start.Add(6 * time.Hour))
	expect("6 hours ahead", start, 6*time.Hour, 0)
	m.pass(4 * time.Minute)
	m.set(start.Add(2*time.Hour + 4*time.Minute)) // now only the first two hours can be confirmed
	expect("2 hours ahead", start.Add(4*time.Minute), 2*time.Hour, 0)
	m.pass(time.Minute)
	start = start.Add(2*time.Hour + confirmation)
	expect("confirmed", start, 0, 0)
	m.set(start.Add(-time.Hour))
	expect("set back too late", start, 0, time.Hour)
	m.set(start)

	// While the wall clock jumps ahead again and again, the clock follows with a limited delay.
	for range 10 {
		m.set(m.now().Add(time.Hour))
		c.now()
		m.pass(4 * time.Minute)
	}
	if delay := m.now().Sub(c.time()); delay > 3*time.Hour {
		t.Errorf("after 40 minutes, the clock is %s late", delay)
	}
	m.pass(confirmation)
	c.now()
	m.pass(confirmation)
	start = m.now()
	expect("at last", start, 0, 0)

	m.suspend(8 * time.Hour)
	start = start.Add(8 * time.Hour)
	expect("after a suspension", start, 0, 0)
	m.suspend(time.Minute)
	m.set(m.now().Add(-2 * time.Hour))
	start = start.Add(time.Minute)
	expect("set back during a suspension", start, 0, 2*time.Hour)
	m.suspend(time.Hour)
	start = start.Add(time.Hour)
	expect("after a suspension while behind", start, 0, 2*time.Hour)
	m.set(start)
	m.suspend(time.Hour)
	m.set(m.now().Add(2 * time.Hour))
	start = start.Add(time.Hour)
	expect("set ahead during a suspension", start, 2*time.Hour, 0)
	if got := c.latest(); !got.Equal(start.Add(2 * time.Hour)) {
		t.Errorf("a key would be created at %s", got)
	}
	c.advance(c.latest())
	start = start.Add(2 * time.Hour)
	expect("when a key was created", start, 0, 0)
}

// The time at the start is used at once, but it is remembered only once the wall clock has stayed there.
func TestTimeAtTheStartIsRememberedLater(t *testing.T) {
	t.Parallel()
	store, path, clock := NewMemory(), keyringPath(t), newManualClock("2026-01-10T10:00:00Z")
	opts := options(store, path)
	opts.readClock, opts.asleep = clock.read, clock.slept
	i, v := openWith(t, opts)
	token, _ := issue(t, i, IssueRequest{Expire: "1d"})
	start := clock.now()
	restart := func(wall time.Time) {
		i.saveUsage() // as Run does when it ends
		clock.set(wall)
		i, v = openWith(t, opts)
	}
	// The clock is wrong at the start, and corrected a minute later.
	restart(start.Add(12 * year))
	refused(t, v, token)
	clock.pass(time.Minute)
	restart(start.Add(time.Minute))
	accepted(t, v, token)
	if behind := i.ClockBehind(); behind != 0 {
		t.Errorf("the clock is %s behind", behind)
	}
	// The clock is right at the start, and set back later.
	restart(start.Add(24 * time.Hour))
	refused(t, v, token)
	clock.pass(confirmation)
	refused(t, v, token)
	restart(start)
	refused(t, v, token)
	if behind := i.ClockBehind(); behind != 24*time.Hour+confirmation {
		t.Errorf("the clock is %s behind", behind)
	}
}

// A clock that is wrong for a moment has no effect on keys, even if an administrator tries to create one meanwhile.
// Afterwards, everything is as before, also after a restart.
func TestClockThatIsWrongForAMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clock := newManualClock("2026-01-10T10:00:00Z")
		store := NewMemory()
		opts := options(store, keyringPath(t))
		opts.readClock, opts.asleep = clock.read, clock.slept
		i, v := openWith(t, opts)
		token, r := issue(t, i, IssueRequest{Name: "taken", Expire: "1h"})
		ctx, cancel := accepted(t, v, token).Bind(t.Context())
		defer cancel()
		stop := run(t, i)
		start := clock.now()
		clock.set(time.Date(2038, 1, 19, 3, 14, 7, 0, time.UTC))
		time.Sleep(2 * time.Minute) // Run saves the usage
		synctest.Wait()
		for _, req := range []IssueRequest{{Expire: "soon"}, {Name: "taken"}, {Name: "not-stored"}} {
			store.FailWith(errDisk)
			if _, _, err := i.Issue(t.Context(), req); err == nil {
				t.Errorf("a key was created: %+v", req)
			}
			store.FailWith(nil)
		}
		accepted(t, v, token)
		if ahead, wait := i.ClockAhead(); ahead < 11*year || wait != confirmation {
			t.Errorf("the clock is %s ahead, to be confirmed in %s", ahead, wait)
		}
		stop()
		clock.set(start)
		for range 2 {
			accepted(t, v, token)
			if behind := i.ClockBehind(); behind != 0 {
				t.Errorf("the clock is %s behind", behind)
			}
			if k, err := i.Find(r.ID); err != nil || k.StateAt(i.Now()) != Live {
				t.Errorf("the key is %+v, %v", k, err)
			}
			i, v = openWith(t, opts)
		}
		if ctx.Err() != nil {
			t.Errorf("a request was canceled: %v", context.Cause(ctx))
		}
	})
}

// No key is accepted after it has expired, even if the clock is changed while the server is running or stopped.
func TestNoClockBringsAKeyToLife(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]time.Duration{
		"a year back": -year, "an hour back": -time.Hour, "a minute back": -time.Minute, "an hour forward": time.Hour, "a year forward": year,
	} {
		for _, restart := range []bool{false, true} {
			if restart {
				name += ", with a restart"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				store, path, clock := NewMemory(), keyringPath(t), newManualClock("2026-01-10T10:00:00Z")
				opts := options(store, path)
				opts.readClock, opts.asleep = clock.read, clock.slept
				i, v := openWith(t, opts)
				forever, _ := issue(t, i, IssueRequest{})
				expired, gone := issue(t, i, IssueRequest{Expire: "1d"})
				accepted(t, v, expired)
				clock.pass(24 * time.Hour)
				refused(t, v, expired)
				live, _ := issue(t, i, IssueRequest{Expire: "2h"}) // its creation time tells the next start the latest time
				end := clock.now().Add(2 * time.Hour)
				accepted(t, v, live)

				clock.set(clock.now().Add(set))
				if restart {
					i, v = openWith(t, opts)
				}
				accepted(t, v, forever)
				refused(t, v, expired)
				if k, err := i.Find(gone.ID); err != nil || k.StateAt(i.Now()) != Expired {
					t.Errorf("Find returns %+v, %v at %s, want an expired key", k, err, i.Now())
				}
				if set < 0 {
					accepted(t, v, live)
				}
				if behind := i.ClockBehind(); (set < -maxCorrection) != (behind > 0) {
					t.Errorf("the clock is %s behind", behind)
				}
				// The change of the clock does not extend the remaining time of a key.
				for range 120 {
					clock.pass(time.Minute)
					// A clock that was set forward is followed after some minutes.
					if _, err := v.Verify(live, from); err == nil && set >= 0 && !clock.now().Before(end.Add(confirmation)) && restart {
						t.Fatalf("at %s, a key is accepted that expired at %s", clock.now(), end)
					}
				}
				refused(t, v, live)
				refused(t, v, expired)
				accepted(t, v, forever)
			})
		}
	}
}

// The latest time is saved with the usage, so that it is known even if no key was created at that time.
func TestLatestTimeIsSaved(t *testing.T) {
	t.Parallel()
	store, path, clock := NewMemory(), keyringPath(t), newManualClock("2026-01-10T10:00:00Z")
	opts := options(store, path)
	opts.readClock, opts.asleep = clock.read, clock.slept
	i, v := openWith(t, opts)
	token, _ := issue(t, i, IssueRequest{Expire: "1d"})
	clock.pass(24 * time.Hour)
	refused(t, v, token)
	i.saveUsage()
	clock.pass(-24 * time.Hour)
	i, v = openWith(t, opts)
	refused(t, v, token)
	if behind := i.ClockBehind(); behind != 24*time.Hour {
		t.Errorf("the clock is %s behind", behind)
	}
}

func TestNoKeysWhileTheClockIsBehind(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	store, path, clock := NewMemory(), keyringPath(t), newManualClock("2026-01-10T10:00:00Z")
	opts := options(store, path)
	opts.readClock, opts.asleep = clock.read, clock.slept
	i, v := openWith(t, opts)
	token, r := issue(t, i, IssueRequest{Name: "a"})
	start := clock.now()
	clock.set(start.Add(year))
	issue(t, i, IssueRequest{}) // the clock follows at once, so that the key has its lifetime
	clock.set(start)
	behind := func() {
		t.Helper()
		if i.ClockBehind() != year {
			t.Errorf("the clock is %s behind", i.ClockBehind())
		}
		for what, err := range map[string]error{
			"Issue":  func() error { _, _, err := i.Issue(ctx, IssueRequest{}); return err }(),
			"Rotate": func() error { _, _, _, err := i.Rotate(ctx, RotateRequest{Ref: "a"}); return err }(),
		} {
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "correct the clock") || !strings.Contains(err.Error(), "server clock accept") {
				t.Errorf("%s: %v", what, err)
			}
		}
		accepted(t, v, token)
	}
	behind()
	i, v = openWith(t, opts)
	behind()

	// Set the clock right, except for a small correction.
	clock.set(start.Add(year - time.Minute))
	issue(t, i, IssueRequest{})
	clock.set(start)
	behind()
	revoke(t, i, r.ID) // a key can be revoked although the clock is behind
	i.saveUsage()      // now the store also has the wrong time

	reset(t, i)
	if i.ClockBehind() != 0 {
		t.Errorf("after a reset, the clock is %s behind", i.ClockBehind())
	}
	fresh, made := issue(t, i, IssueRequest{Expire: "1h"})
	if !made.CreatedAt.Equal(clock.now()) {
		t.Errorf("the key was created at %s, but the time is %s", made.CreatedAt, clock.now())
	}
	check := func() {
		t.Helper()
		accepted(t, v, fresh)
		refused(t, v, token)
		if c := i.Counts(); c != (Counts{Live: 1, Revoked: 3}) || i.ClockBehind() != 0 {
			t.Errorf("counts are %+v, the clock is %s behind", c, i.ClockBehind())
		}
	}
	check()
	i, v = openWith(t, opts)
	check()
}

func TestClockStepsForwardAreReported(t *testing.T) {
	t.Parallel()
	m := newManualClock("2026-01-10T10:00:00Z")
	c := newClock(m.read, m.slept)
	c.accept()
	start := m.now()
	expect := func(what string, want bool) {
		t.Helper()
		if c.stepped() != want {
			t.Errorf("%s: stepped is %t", what, !want)
		}
	}
	expect("at the start", false)
	m.pass(time.Hour)
	expect("after an hour has passed", false)
	m.set(m.now().Add(600 * time.Millisecond))
	expect("after a correction of 600 ms", false)
	m.set(m.now().Add(600 * time.Millisecond))
	expect("after a second correction of 600 ms", true)
	expect("when called again", false)
	m.set(start)
	expect("after the clock was set back", false)
	c.accept()
	expect("after a reset", false)
	m.set(m.now().Add(30 * time.Minute))
	expect("after the clock was set forward again", false)
	m.pass(confirmation)
	expect("when the clock has stayed ahead", true)
	expect("when called again", false)
}

// If a crash interrupts a reset, the next start discards the latest time, as the reset would have done.
func TestClockAfterInterruptedReset(t *testing.T) {
	t.Parallel()
	store, path, clock := NewMemory(), keyringPath(t), newManualClock("2027-01-10T10:00:00Z")
	opts := options(store, path)
	opts.readClock, opts.asleep = clock.read, clock.slept
	i, _ := openWith(t, opts)
	issue(t, i, IssueRequest{})
	i.saveUsage()
	clock.set(clock.now().Add(-year))
	store.FailIf(func(c Change) error {
		if len(c.Put) > 0 {
			return errDisk
		}
		return nil
	})
	if _, err := i.Reset(context.Background(), 0); err == nil {
		t.Fatal("Reset returned no error")
	}
	store.FailWith(nil)
	for range 2 {
		i, _ = openWith(t, opts)
		if i.ClockBehind() != 0 {
			t.Errorf("the clock is %s behind", i.ClockBehind())
		}
		issue(t, i, IssueRequest{})
	}
}

// If the clock is set forward past the expiry of a key and stays there, the key's requests are canceled, although the
// timer of its session has not fired yet. Those of a key that expires later are canceled when it expires by the new time.
func TestClockSetForwardCancelsRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clock := newManualClock("2026-01-10T10:00:00Z")
		opts := options(NewMemory(), keyringPath(t))
		opts.readClock, opts.asleep = clock.read, clock.slept
		i, v := openWith(t, opts)
		token, _ := issue(t, i, IssueRequest{Expire: "1d"})
		other, _ := issue(t, i, IssueRequest{Expire: "26h"})
		ctx, cancel := accepted(t, v, token).Bind(t.Context())
		defer cancel()
		otherCtx, cancel := accepted(t, v, other).Bind(t.Context())
		defer cancel()
		stop := run(t, i)
		defer stop()
		start := time.Now()
		clock.set(clock.now().Add(24 * time.Hour))
		time.Sleep(1500 * time.Millisecond) // Run looks at the clock once a second
		clock.pass(confirmation)
		canceledByRefusal(t, ctx)
		if took := time.Since(start); took > 2500*time.Millisecond {
			t.Errorf("the context was canceled only after %s", took)
		}
		if otherCtx.Err() != nil {
			t.Error("the context of another key was canceled as well")
		}
		clock.pass(2 * time.Hour)
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		canceledByRefusal(t, otherCtx)
	})
}

// Random changes of the clock, suspensions, restarts and new keys, compared with a model that tracks how long each key
// may live, and for how long the wall clock has been past its expiry.
func TestClockWalk(t *testing.T) {
	t.Parallel()
	seed := randtest.Seed(t)
	for walk := range iterations(t, 20, 2000) {
		rnd := rand.New(rand.NewPCG(seed, uint64(walk)))
		store, path, clock := NewMemory(), keyringPath(t), newManualClock("2026-01-10T10:00:00Z")
		opts := options(store, path)
		opts.readClock, opts.asleep = clock.read, clock.slept
		i, v := openWith(t, opts)
		type modelKey struct {
			token     string
			expires   time.Time     // according to the clock when the key was created
			remaining time.Duration // of real time
			past      time.Duration // for how long, in time in which the server runs, the wall clock has been past expires
			dead      bool
			final     bool // the key is dead even after a restart with a corrected clock
		}
		var keys []*modelKey
		for range 100 {
			var passed time.Duration
			var restarted bool
			switch rnd.IntN(7) {
			case 0:
				hours := 1 + rnd.IntN(48)
				secret, r, err := i.Issue(context.Background(), IssueRequest{Expire: fmt.Sprintf("%dh", hours)})
				if errdefs.IsFailedPrecondition(err) && i.ClockBehind() > 0 {
					reset(t, i)
					for _, k := range keys {
						k.dead = true
					}
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				for _, k := range keys {
					k.final = k.dead // the store remembers the time with the new key
				}
				keys = append(keys, &modelKey{token: secret.Reveal(), expires: r.ExpiresAt, remaining: time.Duration(hours) * time.Hour})
			case 1:
				passed = time.Duration(rnd.Int64N(int64(12 * time.Hour)))
				clock.pass(passed)
			case 5:
				passed = time.Duration(rnd.Int64N(int64(10 * time.Minute)))
				clock.pass(passed)
			case 6:
				d := time.Duration(rnd.Int64N(int64(12 * time.Hour)))
				clock.suspend(d)
				for _, k := range keys {
					k.remaining -= d
				}
			case 2:
				clock.set(clock.now().Add(time.Duration(rnd.Int64N(int64(2*year)) - int64(year))))
			case 3:
				i.saveUsage()
				i, v = openWith(t, opts)
				restarted = true
				for _, k := range keys {
					k.dead, k.past = k.final, 0
				}
			case 4:
				i.saveUsage()
			}
			i.clock.observe() // as Run does
			for n, k := range keys {
				k.remaining -= passed
				if k.past += passed; clock.now().Before(k.expires) {
					k.past = 0
				}
				_, err := v.Verify(k.token, from)
				switch {
				case err != nil:
					k.dead = true
					k.final = k.final || k.remaining <= 0 || k.past > 2*confirmation
				case restarted && !clock.now().Before(k.expires):
					t.Fatalf("walk %d: after a restart at %s, key %d is accepted but expired at %s", walk, clock.now(), n, k.expires)
				case k.dead:
					t.Fatalf("walk %d: key %d is accepted after it was refused", walk, n)
				case k.remaining <= 0:
					t.Fatalf("walk %d: key %d is accepted for longer than requested", walk, n)
				case k.past > 2*confirmation:
					t.Fatalf("walk %d: key %d is accepted at %s but expired at %s", walk, n, clock.now(), k.expires)
				}
			}
		}
	}
}
