package kata

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

const (
	// minDiskInterval is the shortest time between two measurements of one sandbox. Measuring a writable layer walks all
	// of its files, and a sandbox may have millions.
	minDiskInterval = 10 * time.Second
	// diskIntervalFactor makes the measurements of a sandbox take at most a tenth of the time.
	diskIntervalFactor = 10
	// diskTimeout bounds one measurement.
	diskTimeout = time.Minute
	// diskMemory is how long a result is kept after it could be measured again.
	diskMemory = time.Hour
	// diskPatience is how long a caller waits for a measurement before it gets the previous result. It is shorter than the
	// time that the domain allows for all measurements of a sandbox, so that the others are not lost.
	diskPatience = time.Second
)

// errNotMeasured is the result until the first measurement of a sandbox is complete.
var errNotMeasured = errors.New("its files are still being counted")

// A diskMeter measures how much disk space sandboxes use. It remembers the results.
type diskMeter struct {
	measure func(ctx context.Context, id string) (uint64, error)
	running singleflight.Group // by sandbox id

	mu      sync.Mutex
	results map[string]diskResult // by sandbox id
}

type diskResult struct {
	bytes uint64
	err   error
	next  time.Time // when to measure again
}

func newDiskMeter(measure func(ctx context.Context, id string) (uint64, error)) *diskMeter {
	return &diskMeter{measure: measure, results: map[string]diskResult{}}
}

// usage returns the disk space that sandbox id uses, in bytes. It may be as old as the last measurement took times
// diskIntervalFactor, or minDiskInterval if that is longer. Only one measurement of a sandbox runs at a time. If it takes
// longer than diskPatience or ctx, it continues, and usage returns the previous result or errNotMeasured.
func (m *diskMeter) usage(ctx context.Context, id string) (uint64, error) {
	m.mu.Lock()
	last, known := m.results[id]
	m.mu.Unlock()
	start := time.Now()
	if known && start.Before(last.next) {
		return last.bytes, last.err
	}
	measured := m.running.DoChan(id, func() (any, error) {
		ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), diskTimeout,
			fmt.Errorf("its files could not be counted within %s", diskTimeout))
		defer cancel()
		bytes, err := m.measure(ctx, id)
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		now := time.Now()
		result := diskResult{bytes: bytes, err: err, next: now.Add(max(minDiskInterval, diskIntervalFactor*now.Sub(start)))}
		m.mu.Lock()
		defer m.mu.Unlock()
		m.results[id] = result
		// Forget the results that nobody has asked for in a long time, such as those of sandboxes that were stopped.
		maps.DeleteFunc(m.results, func(_ string, r diskResult) bool { return now.Sub(r.next) > diskMemory })
		return result, nil
	})
	select {
	case done := <-measured:
		result := done.Val.(diskResult)
		return result.bytes, result.err
	case <-ctx.Done():
	case <-time.After(diskPatience):
	}
	if !known {
		return 0, errNotMeasured
	}
	return last.bytes, last.err
}
