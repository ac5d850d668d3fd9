package hostclock

import (
	"errors"
	"log/slog"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// fakeHost is a host whose clock is ahead by offset and advances in ticks. A reading takes the time that took returns.
type fakeHost struct {
	offset, tick time.Duration
	took         func(n int) time.Duration
	n            int
}

func (h *fakeHost) read() (reading, error) {
	half := h.took(h.n) / 2
	h.n++
	r := reading{before: time.Now()}
	time.Sleep(half)
	r.host = time.Now().Add(h.offset).Truncate(h.tick)
	time.Sleep(half)
	r.after = time.Now()
	return r, nil
}

func TestMeasure(t *testing.T) {
	fast := func(int) time.Duration { return 700 * time.Microsecond }
	interrupted := func(n int) time.Duration {
		if n%4 == 0 {
			return 15 * time.Millisecond
		}
		return fast(n)
	}
	for name, h := range map[string]fakeHost{
		"behind":      {offset: -691_800 * time.Microsecond, tick: 4 * time.Millisecond, took: fast},
		"ahead":       {offset: 3*time.Hour + 300*time.Microsecond, tick: 4 * time.Millisecond, took: fast},
		"same":        {tick: 4 * time.Millisecond, took: fast},
		"slow tick":   {offset: time.Second / 3, tick: maxTick, took: fast},
		"fine stamps": {offset: -time.Second / 3, tick: 1, took: fast},
		"interrupted": {offset: time.Minute + 1_700*time.Microsecond, tick: 4 * time.Millisecond, took: interrupted},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				offset, err := measure(h.read)
				if err != nil || (offset-h.offset).Abs() > precision/2 {
					t.Errorf("measured %v, %v; want %v ± %v", offset, err, h.offset, precision/2)
				}
			})
		})
	}
}

// TestAgrees checks which differences a single reading shows.
func TestAgrees(t *testing.T) {
	for offset, want := range map[time.Duration]bool{
		0: true, 20 * time.Millisecond: false, -20 * time.Millisecond: false, time.Hour: false, -time.Hour: false,
	} {
		synctest.Test(t, func(t *testing.T) {
			for range 20 {
				h := fakeHost{offset: offset, tick: maxTick, took: func(int) time.Duration { return time.Millisecond }}
				if r, _ := h.read(); r.agrees() != want {
					t.Errorf("clocks that differ by %v agree: %v, want %v", offset, !want, want)
				}
			}
		})
	}
}

// TestReadHost reads the time of this machine, which stamps the file itself.
func TestReadHost(t *testing.T) {
	dir := t.TempDir()
	f, err := openHidden(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if files, err := os.ReadDir(dir); err != nil || len(files) > 0 {
		t.Errorf("the directory has the files %v, %v; want none", files, err)
	}
	offset, err := measure(func() (reading, error) { return readHost(f) })
	if err != nil || offset.Abs() > maxTick {
		t.Errorf("the clock that stamps files is ahead by %v, %v; want at most %v", offset, err, maxTick)
	}
}

// TestClockStandsStill measures a host that stamps a file only once.
func TestClockStandsStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := fakeHost{tick: time.Hour, took: func(int) time.Duration { return time.Millisecond }}
		if offset, err := measure(h.read); err == nil {
			t.Errorf("measured %v from a clock that does not advance", offset)
		}
	})
}

func TestFollowNeedsShare(t *testing.T) {
	if _, err := Follow(t.TempDir(), slog.New(slog.DiscardHandler)); !errors.Is(err, errNotShared) {
		t.Errorf("Follow in a local directory returned %v, want %v", err, errNotShared)
	}
}

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
