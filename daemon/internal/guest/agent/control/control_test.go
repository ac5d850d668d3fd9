package control

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestCorrection(t *testing.T) {
	step := func(sec, nsec int64) unix.Timex {
		return unix.Timex{Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO, Time: unix.Timeval{Sec: sec, Usec: nsec}}
	}
	slew := func(usec int64) unix.Timex {
		return unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT, Offset: usec}
	}
	for offset, want := range map[time.Duration]unix.Timex{
		0:                                slew(0),
		4 * time.Millisecond:             slew(4000),
		-5 * time.Millisecond:            slew(-5000),
		5*time.Millisecond + 1:           step(0, 5_000_001),
		-6 * time.Millisecond:            step(-1, 994_000_000),
		-2 * time.Second:                 step(-2, 0),
		3*time.Hour + 7*time.Millisecond: step(10800, 7_000_000),
		-2500 * time.Millisecond:         step(-3, 500_000_000),
	} {
		if got := correction(offset); got != want {
			t.Errorf("correction of %v is %+v, want %+v", offset, got, want)
		}
	}
}
