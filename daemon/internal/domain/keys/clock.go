package keys

import (
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

// maxCorrection is how far back the wall clock may go before the server calls it behind: more than time
// servers correct.
const maxCorrection = 5 * time.Minute

// clock is the time by which keys live and die. It never goes back: it is the wall clock or, if that is
// later, the latest time that was ever seen, counted on. So a clock that is set back, by mistake or on
// purpose, brings no expired key to life.
type clock struct {
	// read returns the wall clock and a steady clock that nobody sets, both in microseconds:
	// nanoseconds would not reach the year 9999.
	read func() (wall, steady int64)
	// lead is the most that the wall clock was ever ahead of the steady one.
	lead atomic.Int64
	// noticed is the lead at the last step; only stepped touches it.
	noticed int64
}

func newClock(read func() (wall, steady int64)) *clock {
	c := &clock{read: read}
	c.set()
	c.noticed = c.lead.Load()
	return c
}

// systemClock reads the clocks of the operating system.
func systemClock() func() (wall, steady int64) {
	start := time.Now()
	return func() (int64, int64) {
		now := time.Now() // reads both
		return now.UnixMicro(), now.Sub(start).Microseconds()
	}
}

// now is in microseconds since 1970.
func (c *clock) now() int64 {
	wall, steady := c.read()
	return steady + c.raise(wall-steady)
}

// time is now as records and tokens carry it: in UTC, in whole milliseconds. It compares with those as
// the exact time would, because they are whole, too.
func (c *clock) time() time.Time { return moment(c.now()) }

// wall is what the wall clock says, in the form of time.
func (c *clock) wall() time.Time {
	wall, _ := c.read()
	return moment(wall)
}

// advance moves the clock to a time that is known to have been.
func (c *clock) advance(to time.Time) {
	if !to.IsZero() {
		_, steady := c.read()
		c.raise(to.UnixMicro() - steady)
	}
}

// set forgets every time that was seen, and follows the wall clock from now on.
func (c *clock) set() {
	wall, steady := c.read()
	c.lead.Store(wall - steady)
}

// behind is how far the wall clock lies behind the clock, if no correction explains it, else 0.
func (c *clock) behind() time.Duration {
	wall, steady := c.read()
	micros := steady + c.raise(wall-steady) - wall
	if micros <= maxCorrection.Microseconds() {
		return 0
	}
	return time.Duration(min(micros, math.MaxInt64/1000)) * time.Microsecond
}

// stepped reports whether the wall clock was set forward, by a second or more, since it last said so. It is
// not safe for concurrent use.
func (c *clock) stepped() bool {
	c.now()
	lead := c.lead.Load()
	forward := lead-c.noticed >= time.Second.Microseconds()
	if forward || lead < c.noticed {
		c.noticed = lead
	}
	return forward
}

// check refuses to make keys by a clock that is behind: they would be born in a future that may be wrong.
func (c *clock) check() error {
	behind := c.behind()
	if behind == 0 {
		return nil
	}
	return fmt.Errorf("no API key can be made while the clock is %s behind the latest time that this server has seen (%s): "+
		"set the clock right; if it is right and was wrong before, 'msb server reset' begins anew and invalidates every API key: %w",
		behind.Round(time.Second), c.time().Format(time.RFC3339), errdefs.ErrFailedPrecondition)
}

func (c *clock) raise(lead int64) int64 {
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

func moment(micros int64) time.Time { return time.UnixMicro(micros).UTC().Truncate(time.Millisecond) }
