// Package tsc measures how fast this processor's time stamp counter (TSC) counts. Guests that QEMU emulates read the
// host's counter. Their kernels measure its speed as they boot, against an emulated timer, and get it wrong by a factor
// of up to 50 if the host is busy; then the guest's clock is wrong. So the host tells them.
package tsc

import (
	"slices"
	"time"
)

// KHz returns the speed of the counter in kHz, or 0 if this kind of processor has none. It takes 10 ms.
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

// read reads clock and counter at the same time: of several attempts, it takes the one in which the least time passed.
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
