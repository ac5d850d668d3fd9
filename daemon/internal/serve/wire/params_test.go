package wire

import (
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestSeconds(t *testing.T) {
	for value, want := range map[float64]time.Duration{0: 0, 1: time.Second, 0.5: time.Second / 2, 1e-12: 1, 1e300: 1<<63 - 1} {
		if got, err := Seconds("timeout", value, "for no limit"); err != nil || got != want {
			t.Errorf("%g seconds: got %d, error %v; want %d", value, got, err, want)
		}
	}
	if _, err := Seconds("timeout", -1, "for no limit"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("-1 seconds: got error %v, want InvalidArgument", err)
	}
}

func TestMode(t *testing.T) {
	for text, want := range map[string]uint32{"0644": 0o644, "7777": 0o7777, "0": 0} {
		if got, err := Mode(text); err != nil || *got != want {
			t.Errorf("%q: got %v, error %v; want %o", text, got, err, want)
		}
	}
	for _, text := range []string{"", "rw", "-1", "8", "10000", "0o644", "77777777777777777777777"} {
		if got, err := Mode(text); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: got %v, error %v; want InvalidArgument", text, got, err)
		}
	}
}
