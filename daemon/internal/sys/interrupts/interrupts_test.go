package interrupts_test

import (
	"testing"

	"github.com/msbd/msbd/daemon/internal/sys/interrupts"
)

func TestSet(t *testing.T) {
	var s interrupts.Set[string]
	if s.Interrupt("a") {
		t.Error("an operation was interrupted that was never added")
	}
	a, removeA, ok := s.Add("a")
	b, removeB, okB := s.Add("b")
	if !ok || !okB {
		t.Fatal("the keys are in use")
	}
	if _, _, ok := s.Add("a"); ok {
		t.Error("two operations have the same key")
	}
	for range 2 {
		for range 2 { // they count as one
			if !s.Interrupt("a") {
				t.Error("the operation is not known")
			}
		}
		if <-a; len(a) != 0 || len(b) != 0 {
			t.Errorf("%d interrupts are left, and other operations have %d", len(a), len(b))
		}
	}
	removeA()
	if s.Interrupt("a") {
		t.Error("an operation was interrupted that has ended")
	}
	again, remove, ok := s.Add("a")
	if !ok || len(again) != 0 {
		t.Errorf("after the end: the key is free: %t, interrupts of the new operation: %d", ok, len(again))
	}
	remove()
	removeB()
}
