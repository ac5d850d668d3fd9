package keys

import (
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// maxCorrection is how far the wall clock may be set back before the server reports that it is behind, and how far it
	// may be set forward before the server waits to see whether it stays there. It is more than a time server would
	// correct.
	maxCorrection = 5 * time.Minute
	// confirmation is how long the wall clock must stay ahead until the server uses its time.
	confirmation = 5 * time.Minute
)

// clock tells the time by which keys are created and expire. It normally follows the wall clock. If the wall clock is
// set back, whether by mistake or on purpose, clock continues from the latest time that it has used, so that no expired
// key becomes valid again. Only accept makes it go back.
//
// A wall clock that is wrong for a moment must not end every key that expires. So if the wall clock is set forward by
// more than maxCorrection, clock continues from the earlier time, and uses the new time only once the wall clock has
// stayed there for as long as confirmation. Time in which the machine was suspended needs no confirmation. When the
// server starts, nothing else tells how much time has passed, so clock uses the wall clock at once. But it remembers
// that time only after confirmation: until then, a restart uses another time if the wall clock has been corrected.
type clock struct {
	// read returns the wall clock and a monotonic clock, both in microseconds. An int64 of nanoseconds would not
	// reach the year 9999.
	read func() (wall, steady int64)
	// asleep returns for how long this machine has been suspended since it booted, in microseconds. The steady clock
	// does not count this time.
	asleep func() int64
	// lead is how far the clock is ahead of the steady clock. It is at least trusted.
	lead atomic.Int64

	mu sync.Mutex
	// trusted is the lead that may be remembered: that of a time that has certainly passed, or that the wall clock has
	// shown for long enough.
	trusted int64
	// pending is the smallest lead that the wall clock has shown since pendingSince on the steady clock, if that was
	// always more than maxCorrection beyond trusted. Otherwise it is 0, and pendingSince is noTime.
	pending, pendingSince int64
	// slept is what asleep returned when observe last noticed that the machine was suspended.
	slept int64

	// steppedLead is the value of lead up to which stepped has reported steps. Only stepped uses it.
	steppedLead int64
}

const noTime = math.MinInt64 / 4 // plus any time, it is still less than any time

func newClock(read func() (wall, steady int64), asleep func() int64) *clock {
	c := &clock{read: read, asleep: asleep, trusted: noTime, pendingSince: noTime, slept: asleep()}
	wall, steady := read()
	c.lead.Store(wall - steady)
	c.steppedLead = c.lead.Load()
	c.observe()
	return c
}

// systemClock returns a function that reads the clocks of the operating system.
func systemClock() func() (wall, steady int64) {
	start := time.Now()
	return func() (int64, int64) {
		now := time.Now() // reads both the wall clock and the monotonic clock
		return now.UnixMicro(), now.Sub(start).Microseconds()
	}
}

// systemSleep returns for how long this machine has been suspended since it booted, in microseconds.
func systemSleep() int64 {
	var boot, monotonic unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot) != nil || unix.ClockGettime(unix.CLOCK_MONOTONIC, &monotonic) != nil {
		return 0
	}
	return (boot.Nano() - monotonic.Nano()) / 1000
}

// now returns the time in microseconds since 1970.
func (c *clock) now() int64 {
	wall, steady := c.read()
	lead := c.lead.Load()
	if wall-steady > lead {
		lead = c.observe()
	}
	return steady + lead
}

// observe compares the wall clock with the clock and returns the new lead. While the server runs, it must be called
// regularly, so that a time that the wall clock shows is confirmed.
func (c *clock) observe() (lead int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wall, steady := c.read()
	shown := wall - steady
	if slept := c.asleep() - c.slept; slept >= time.Second.Microseconds() { // less may be an error of the measurement
		c.slept += slept
		c.lead.Add(slept)
		c.trusted += slept
		c.pending += slept
	}
	switch {
	case shown <= c.trusted+maxCorrection.Microseconds():
		c.trusted = max(c.trusted, shown)
		c.pending, c.pendingSince = 0, noTime
	case c.pendingSince == noTime:
		c.pending, c.pendingSince = shown, steady
	default:
		c.pending = min(c.pending, shown)
		if steady-c.pendingSince >= confirmation.Microseconds() {
			c.trusted = c.pending
			c.pending, c.pendingSince = 0, noTime
		}
	}
	return c.raise(c.trusted)
}

// time returns the time in the form that records and tokens use: in UTC, truncated to milliseconds. The times in
// records are truncated as well, so comparing them with the truncated time gives the same result as with the exact
// time.
func (c *clock) time() time.Time { return fromMicros(c.now()) }

// wall returns the time of the wall clock, in the same form as time.
func (c *clock) wall() time.Time {
	wall, _ := c.read()
	return fromMicros(wall)
}

// trustedTime returns the time to remember, in the same form as time, or zero if the time is not confirmed yet.
func (c *clock) trustedTime() time.Time {
	c.observe()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.trusted < noTime/2 {
		return time.Time{}
	}
	_, steady := c.read()
	return fromMicros(steady + c.trusted)
}

// latest returns the time of the wall clock, if that is later, and otherwise the time, both in the same form as time. The
// clock does not change.
func (c *clock) latest() time.Time {
	now, wall := c.time(), c.wall()
	if wall.After(now) {
		return wall
	}
	return now
}

// advance moves the clock forward to a time that is known to have passed, or that a stored record depends on. That time
// may be remembered.
func (c *clock) advance(to time.Time) {
	if to.IsZero() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	_, steady := c.read()
	c.trusted = max(c.trusted, to.UnixMicro()-steady)
	if c.pending <= c.trusted+maxCorrection.Microseconds() {
		c.pending, c.pendingSince = 0, noTime
	}
	c.raise(c.trusted)
}

// accept makes the clock follow the wall clock again, even if that means going back.
func (c *clock) accept() {
	c.mu.Lock()
	defer c.mu.Unlock()
	wall, steady := c.read()
	c.trusted = wall - steady
	c.pending, c.pendingSince = 0, noTime
	c.lead.Store(c.trusted)
}

// behind returns how far the wall clock is behind the clock. It returns 0 if the difference is at most
// maxCorrection.
func (c *clock) behind() time.Duration {
	wall, _ := c.read()
	behind := duration(c.now() - wall)
	if behind <= maxCorrection {
		return 0
	}
	return behind
}

// ahead returns how far the wall clock is ahead of the clock while the clock waits to see whether it stays there, and
// for how long the clock waits at most if it does. Otherwise ahead is 0.
func (c *clock) ahead() (ahead, wait time.Duration) {
	c.observe()
	c.mu.Lock()
	defer c.mu.Unlock()
	wall, steady := c.read()
	ahead = duration(wall - steady - c.lead.Load())
	if c.pendingSince == noTime || ahead <= maxCorrection {
		return 0, 0
	}
	return ahead, confirmation - duration(steady-c.pendingSince)
}

// stepped reports whether the clock went forward by a second or more since stepped last returned true, because the wall
// clock was set forward. It is not safe for concurrent use.
func (c *clock) stepped() bool {
	c.observe()
	lead := c.lead.Load()
	forward := lead-c.steppedLead >= time.Second.Microseconds()
	if forward || lead < c.steppedLead {
		c.steppedLead = lead
	}
	return forward
}

// checkNotBehind returns an error if the clock is behind. Keys must not be created then, because their creation
// time and expiry would be computed from a time that may be wrong.
func (c *clock) checkNotBehind() error {
	behind := c.behind()
	if behind == 0 {
		return nil
	}
	return fmt.Errorf("no API key can be created while the clock is %s behind the latest time that this server has used (%s): "+
		"correct the clock. If it is correct now but was ahead before, run 'msb server clock accept': %w",
		behind.Round(time.Second), c.time().Format(time.RFC3339), errdefs.ErrFailedPrecondition)
}

// raise raises c.lead to lead, unless it is higher already, and returns the new value. The caller holds c.mu.
func (c *clock) raise(lead int64) int64 {
	lead = max(lead, c.lead.Load())
	c.lead.Store(lead)
	return lead
}

// duration converts microseconds.
func duration(micros int64) time.Duration {
	return time.Duration(max(math.MinInt64/1000, min(micros, math.MaxInt64/1000))) * time.Microsecond
}

// fromMicros converts microseconds since 1970 to a time in UTC, truncated to milliseconds.
func fromMicros(micros int64) time.Time {
	return time.UnixMicro(micros).UTC().Truncate(time.Millisecond)
}
