package limit

import (
	"fmt"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

func TestLRU(t *testing.T) {
	l := NewLRU[int, int](2)
	l.Put(1, 1)
	l.Put(2, 2)
	l.Get(1)
	l.Peek(2) // does not mark 2 as used
	l.Put(3, 3)
	l.Put(3, 4)
	_, one := l.Get(1)
	_, two := l.Get(2)
	three, _ := l.Get(3)
	if !one || two || three != 4 || l.Len() != 2 {
		t.Errorf("has 1: %v, 2: %v, %d entries, 3 = %d; want 1 but not 2, and 3 = 4", one, two, l.Len(), three)
	}
}

func TestRatesAreBounded(t *testing.T) {
	r := NewRates(1)
	for i := range 2 * MaxRates {
		r.Of(fmt.Sprint("key", i))
	}
	if n := r.byKey.Len(); n != MaxRates {
		t.Errorf("%d buckets are kept, want %d", n, MaxRates)
	}
	none := NewRates(0).Of("key")
	if none != nil || none.Take() != 0 {
		t.Error("a rate of 0 is not unlimited")
	}
	none.Owe(7)
	slow := NewRates(1e-12).Of("key")
	slow.Take()
	if wait := slow.Take(); wait != math.MaxInt32 {
		t.Errorf("with a very low rate, Take = %d s, want %d", wait, math.MaxInt32)
	}
}

// Calls that Owe takes delay the later ones.
func TestOwe(t *testing.T) {
	b := NewRates(10).Of("key") // 10 calls at once
	if b.Take() != 0 {
		t.Fatal("the first call must wait")
	}
	b.Owe(29)
	if wait := b.Take(); wait != 3 { // 21 calls at 10 per second
		t.Errorf("Take = %d s, want 3", wait)
	}
}

func TestBudget(t *testing.T) {
	b := NewBudget(30, 20)
	for _, step := range []struct {
		key  string
		n    int
		want Excess
	}{
		{"a", 20, Within}, {"a", 1, OverEach}, {"b", 10, Within}, {"b", 1, OverAll}, {"b", 11, OverEach}, {"c", 0, Within},
	} {
		if got := b.Hold(step.key, step.n); got != step.want {
			t.Errorf("Hold(%q, %d) = %d, want %d", step.key, step.n, got, step.want)
		}
	}
	b.Release("a", 20)
	if b.Hold("b", 10) != Within || b.Hold("c", 10) != Within {
		t.Error("released bytes cannot be held again")
	}
	b.Release("b", 20)
	b.Release("c", 10)
	b.Release("c", 0)
	if bytes, _ := b.Held(); bytes != 0 {
		t.Errorf("%d bytes are held, want none", bytes)
	}
}

func TestCounts(t *testing.T) {
	c := NewCounts(3)
	var wg sync.WaitGroup
	var mu sync.Mutex
	entered := 0
	for range 10 {
		wg.Go(func() {
			if c.Enter("a") {
				mu.Lock()
				defer mu.Unlock()
				entered++
			}
		})
	}
	wg.Wait()
	if entered != 3 || !c.Enter("b") || c.Keys() != 2 {
		t.Errorf("%d of 10 entered, want 3; %d keys, want 2", entered, c.Keys())
	}
	c.Leave("b")
	for range 3 {
		c.Leave("a")
	}
	if c.Keys() != 0 || !c.Enter("a") {
		t.Error("the counts are not zero after Leave")
	}
}

// At most two goroutines of a key have a turn at a time, and those of other keys do not matter.
func TestTurns(t *testing.T) {
	turns := NewTurns(2)
	turns.Take("other")
	turns.Take("other")
	var wg sync.WaitGroup
	var working, peak atomic.Int32
	for range 20 {
		wg.Go(func() {
			for range 50 {
				turns.Take("a")
				if n := working.Add(1); n > peak.Load() {
					peak.Store(n)
				}
				runtime.Gosched()
				working.Add(-1)
				turns.Return("a")
			}
		})
	}
	wg.Wait()
	if peak.Load() != 2 || turns.Users() != 2 {
		t.Errorf("%d goroutines worked at a time, want 2; %d use turns, want 2", peak.Load(), turns.Users())
	}
}
