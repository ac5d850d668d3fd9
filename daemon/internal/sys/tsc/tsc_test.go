package tsc

import (
	"runtime"
	"testing"
)

// TestKHz checks that two measurements agree. The kernel's own figure is in no file that every host has.
func TestKHz(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		if got := KHz(); got != 0 {
			t.Errorf("the speed of a counter that is not there: %d kHz", got)
		}
		return
	}
	first, second := KHz(), KHz()
	if difference := max(first, second) - min(first, second); first < 100_000 || difference > first/1000 {
		t.Errorf("measured %d kHz and %d kHz, want the same to 0.1 percent, and at least 100 MHz", first, second)
	}
}
