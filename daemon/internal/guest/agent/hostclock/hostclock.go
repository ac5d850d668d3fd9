// Package hostclock makes the guest's clock follow the host's clock.
//
// Without it, the guest's clock is up to one second wrong, because the real-time clock from which the kernel sets it at
// boot has a resolution of one second. The host's clock stamps the files of a container, so new files could be in the
// future. The guest's clock would also stay behind by the time for which its machine was suspended.
//
// The guest's kernel asks virtiofsd on the host to change a file, and virtiofsd responds with the time of the change.
// This way, a container's files and its clock have the same time, and no other program on the host is involved.
package hostclock

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// interval is the time between two checks of the clock.
	interval = 30 * time.Second
	// maxTick is the longest time for which Linux stamps files with the same time.
	maxTick = 10 * time.Millisecond
	// maxSlew is the largest difference that is corrected gradually, so that time does not go backwards. The kernel
	// corrects 0.5 ms per second, so it has finished before the next check.
	maxSlew = 5 * time.Millisecond
	// precision is the width of the range in which a measurement finds the difference of the clocks.
	precision = 2 * time.Millisecond
	// maxTime is the time after which a measurement on a busy machine ends with less precision.
	maxTime = 250 * time.Millisecond
)

// errNotShared means that the host does not stamp the container's files.
var errNotShared = errors.New("the container's root is not a virtiofs share")

// Follow sets the guest's clock to that of the host, and then checks it every 30 seconds until stop is called. root is
// the root of a container that has not started yet. Follow holds a file open in it, which the container cannot see.
// stop may be called more than once.
func Follow(root string, log *slog.Logger) (stop func(), err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(root, &fs); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: root, Err: err}
	}
	if fs.Type != unix.FUSE_SUPER_MAGIC {
		return nil, errNotShared
	}
	f, err := openHidden(root)
	if err != nil {
		return nil, err
	}
	read := func() (reading, error) { return readHost(f) }
	if err := synchronize(read); err != nil {
		f.Close()
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer f.Close()
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			if err := check(read); err != nil {
				log.Warn("could not check the clock", "err", err)
			}
		}
	}()
	return func() { cancel(); <-done }, nil
}

// openHidden returns a new file in the directory dir that has no name.
func openHidden(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, ".clock-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// reading is the time with which the host stamped a file, between two times of the guest. The host's clock was then at
// this time, or at most maxTick later.
type reading struct {
	before, host, after time.Time
}

// readHost changes f, which makes the host stamp it.
func readHost(f *os.File) (reading, error) {
	r := reading{before: time.Now()}
	if err := f.Chmod(0o600); err != nil {
		return reading{}, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return reading{}, fmt.Errorf("read the time of the host: %w", err)
	}
	r.after = time.Now()
	r.host = time.Unix(st.Ctim.Unix())
	return r, nil
}

// agrees reports whether the two clocks can be the same.
func (r reading) agrees() bool {
	return !r.host.After(r.after) && !r.host.Add(maxTick).Before(r.before)
}

// check corrects the clock if a single reading shows that it is wrong. This is much cheaper than a measurement.
func check(read func() (reading, error)) error {
	r, err := read()
	if err != nil || r.agrees() {
		return err
	}
	return synchronize(read)
}

// synchronize measures how far the host's clock is ahead, and corrects the guest's clock.
func synchronize(read func() (reading, error)) error {
	offset, err := measure(read)
	if err != nil {
		return err
	}
	c := correction(offset)
	if _, err := unix.Adjtimex(&c); err != nil {
		return fmt.Errorf("correct the clock by %v: %w", offset, err)
	}
	return nil
}

// measure returns how far the host's clock is ahead of the guest's. It waits for ticks of the host's clock. A tick
// happened after the request for the last reading before it, and before the response with the first reading after it.
// measure ends when these limits are close together, or after maxTime.
func measure(read func() (reading, error)) (offset time.Duration, err error) {
	last, err := read()
	if err != nil {
		return 0, err
	}
	start, ticked := last.before, false
	low, high := last.host.Sub(last.after), time.Duration(math.MaxInt64)
	for !ticked || high-low > precision && last.after.Sub(start) < maxTime {
		r, err := read()
		if err != nil {
			return 0, err
		}
		low = max(low, r.host.Sub(r.after))
		if !r.host.Equal(last.host) {
			ticked, high = true, min(high, r.host.Sub(last.before))
		}
		last = r
		if !ticked && last.after.Sub(start) > maxTime {
			return 0, fmt.Errorf("the host's clock stands still at %v", last.host)
		}
	}
	return low + (high-low)/2, nil
}

// correction returns the request to the kernel that moves the clock forward by offset. Small offsets are corrected
// gradually.
func correction(offset time.Duration) unix.Timex {
	if offset.Abs() <= maxSlew {
		return unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT, Offset: offset.Microseconds()}
	}
	sec, nsec := int64(offset/time.Second), int64(offset%time.Second)
	if nsec < 0 { // the kernel requires that the nanoseconds are not negative
		sec, nsec = sec-1, nsec+int64(time.Second)
	}
	return unix.Timex{Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO, Time: unix.Timeval{Sec: sec, Usec: nsec}}
}
