package kata

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Measuring a sandbox's disk usage walks all its files, so the result is remembered.
func TestDiskMeter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		walks, took := map[string]int{}, time.Duration(0)
		m := newDiskMeter(func(ctx context.Context, id string) (uint64, error) {
			mu.Lock()
			walks[id]++
			n := walks[id]
			wait := time.After(took)
			mu.Unlock()
			select {
			case <-wait:
				return uint64(n), nil
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		})
		want := func(what string, id string, want uint64, wantErr error) {
			t.Helper()
			if got, err := m.usage(t.Context(), id); got != want || !errors.Is(err, wantErr) {
				t.Errorf("%s: %d, %v; want %d, %v", what, got, err, want, wantErr)
			}
		}
		want("first", "a", 1, nil)
		time.Sleep(minDiskInterval - time.Nanosecond)
		want("remembered", "a", 1, nil)
		want("another sandbox", "b", 1, nil)
		time.Sleep(time.Nanosecond)
		want("measured again", "a", 2, nil)
		time.Sleep(2 * diskMemory)
		want("measured after a long time", "a", 3, nil)
		if len(m.results) != 1 {
			t.Errorf("results: %v, want only that of a", m.results)
		}

		// Callers do not wait for a long walk, and start no second one.
		took = 5 * time.Second
		time.Sleep(minDiskInterval)
		var callers sync.WaitGroup
		for range 10 {
			callers.Go(func() { want("during a walk", "a", 3, nil) })
		}
		callers.Go(func() { want("during a first walk", "c", 0, errNotMeasured) })
		callers.Wait()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if got, err := m.usage(ctx, "a"); got != 3 || err != nil {
			t.Errorf("during a walk, with a canceled context: %d, %v; want 3, nil", got, err)
		}
		time.Sleep(took)
		want("after a long walk", "a", 4, nil)
		want("after a long first walk", "c", 1, nil)
		time.Sleep(40 * time.Second)
		want("long remembered", "a", 4, nil)

		// A walk that does not end is ended.
		took = time.Hour
		want("during an endless walk", "d", 0, errNotMeasured)
		time.Sleep(diskTimeout)
		if _, err := m.usage(t.Context(), "d"); err == nil || errors.Is(err, errNotMeasured) {
			t.Errorf("after an endless walk: %v", err)
		}
		if walks["d"] != 1 || walks["a"] != 4 {
			t.Errorf("walks: %v", walks)
		}
	})
}
