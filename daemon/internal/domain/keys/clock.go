package keys

import (
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

// maxCorrection is how far the wall clock may go back before the server reports that it is behind. It is more than a time
// server would correct.
const maxCorrection = 5 * time.Minute

// clock tells the time by which keys are created and expire. It normally follows the wall clock. If the wall clock is
// set back, whether by mistake or on purpose, clock continues from the latest time that it has seen, so that no expired
// key becomes valid again. Only reset makes it go back.
type clock struct {
	// read returns the wall clock and a monotonic clock, both in microseconds. An int64 of nanoseconds would not
	// reach the year 9999.
	read func() (wall, steady int64)
	// lead is how far the clock is ahead of the steady clock. It is the largest difference that the wall clock has shown,
	// or that advance has set, since the last reset.
	lead atomic.Int64
	// steppedLead is the value of lead up to which stepped has reported steps. Only stepped uses it.
	steppedLead int64
}

func newClock(read func() (wall, steady int64)) *clock {
	c := &clock{read: read}
	c.reset()
	c.steppedLead = c.lead.Load()
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

// now returns the time in microseconds since 1970.
func (c *clock) now() int64 {
	wall, steady := c.read()
	return steady + c.raiseLead(wall-steady)
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

// advance moves the clock forward to a time that is known to have passed.
func (c *clock) advance(to time.Time) {
	if !to.IsZero() {
		_, steady := c.read()
		c.raiseLead(to.UnixMicro() - steady)
	}
}

// reset makes the clock follow the wall clock again, even if that means going back.
func (c *clock) reset() {
	wall, steady := c.read()
	c.lead.Store(wall - steady)
}

// behind returns how far the wall clock is behind the clock. It returns 0 if the difference is at most
// maxCorrection.
func (c *clock) behind() time.Duration {
	wall, steady := c.read()
	micros := steady + c.raiseLead(wall-steady) - wall
	if micros <= maxCorrection.Microseconds() {
		return 0
	}
	return time.Duration(min(micros, math.MaxInt64/1000)) * time.Microsecond
}

// stepped reports whether the wall clock was set forward by a second or more since stepped last returned true. It
// is not safe for concurrent use.
func (c *clock) stepped() bool {
	c.now()
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
	return fmt.Errorf("no API key can be created while the clock is %s behind the latest time that this server has seen (%s): "+
		"correct the clock. If it is correct now but was ahead before, run 'msb server reset', which accepts the current time and invalidates every API key: %w",
		behind.Round(time.Second), c.time().Format(time.RFC3339), errdefs.ErrFailedPrecondition)
}

// raiseLead raises c.lead to lead, unless it is higher already, and returns the new value.
func (c *clock) raiseLead(lead int64) int64 {
	for {
		seen := c.lead.Load()
		if lead <= seen {
			return seen
		}
		if c.lead.CompareAndSwap(seen, lead) {
			return lead
		}
	}
}

// fromMicros converts microseconds since 1970 to a time in UTC, truncated to milliseconds.
func fromMicros(micros int64) time.Time {
	return time.UnixMicro(micros).UTC().Truncate(time.Millisecond)
}
