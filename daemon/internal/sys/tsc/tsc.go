// Package tsc measures the frequency of this processor's time stamp counter (TSC). A guest that QEMU emulates reads the
// host's counter. When its kernel boots, it measures the frequency against an emulated timer. If the host is busy, the
// result can be wrong by a factor of up to 50, and the guest's clock is wrong. msbd therefore passes the frequency on
// the guest's kernel command line.
package tsc

import (
	"slices"
	"time"
)

// KHz returns the frequency of the counter in kHz, or 0 if this kind of processor has none. It takes 10 ms.
func KHz() int {
	const apart = 2 * time.Millisecond
	var speeds []float64
	last := read()
	if last.ticks == 0 {
		return 0
	}
	for range 5 {
		time.Sleep(apart)
		now := read()
		speeds = append(speeds, float64(now.ticks-last.ticks)/float64(now.at.Sub(last.at).Nanoseconds()))
		last = now
	}
	slices.Sort(speeds)
	return int(speeds[len(speeds)/2] * 1e6)
}

// reading is the counter at a point in time.
type reading struct {
	at    time.Time
	ticks uint64
}

// read reads the clock and the counter at the same time. It makes several attempts and returns the one that took the
// least time.
func read() (best reading) {
	shortest := time.Hour
	for range 100 {
		before := time.Now()
		ticks := rdtsc()
		if took := time.Since(before); took < shortest {
			shortest, best = took, reading{before.Add(took / 2), ticks}
		}
	}
	return best
}
