package thread

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The thread of a function ends with it and is never the main thread, which Go never ends.
func TestRun(t *testing.T) {
	const functions = 20
	want := errors.New("the error of f")
	// All run at the same time, so that some of their goroutines start on the main thread.
	var ready, done sync.WaitGroup
	ready.Add(functions)
	threads := make([]int, functions)
	for i := range threads {
		done.Go(func() {
			err := Run(func() error {
				threads[i] = unix.Gettid()
				ready.Done()
				ready.Wait()
				return want
			})
			if !errors.Is(err, want) {
				t.Errorf("Run = %v, want %v", err, want)
			}
		})
	}
	done.Wait()
	seen := map[int]bool{}
	limit := time.After(10 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for _, id := range threads {
		if id == unix.Getpid() || seen[id] {
			t.Errorf("thread %d is the main thread, or ran two functions; it may not run any other code", id)
			continue
		}
		seen[id] = true
		for { // the thread ends a moment after Run has returned
			if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", id)); errors.Is(err, os.ErrNotExist) {
				break
			}
			select {
			case <-tick.C:
			case <-limit:
				t.Fatalf("thread %d has not ended", id)
			}
		}
	}
}
