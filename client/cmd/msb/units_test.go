package main

import (
	"strings"
	"testing"
	"time"
)

func TestTimeLimit(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"5": 5 * time.Second, "0": 0, "0.5": 500 * time.Millisecond, "90s": 90 * time.Second, "1h30m": 90 * time.Minute,
		"1d": 24 * time.Hour, "1.5d": 36 * time.Hour, "1d2h": 26 * time.Hour, "1w": 7 * 24 * time.Hour, "1w1d1h": 193 * time.Hour, "100ms": 100 * time.Millisecond,
	} {
		var got timeLimit
		if err := got.Set(text); err != nil || time.Duration(got) != want {
			t.Errorf("%q is %v, %v; want %v", text, time.Duration(got), err, want)
		}
	}
	for _, text := range []string{"", "-1", "-1s", "soon", "5 minutes", "1d\n", "w", "d", "1h1d", "NaN", "Inf", "1e300", "200000d", "-1d"} {
		if err := new(timeLimit).Set(text); err == nil {
			t.Errorf("%q is accepted", text)
		} else if !strings.Contains(err.Error(), "s, m, h, d or w") {
			t.Errorf("%q: %v, want an error that lists the units", text, err)
		}
	}
}

func TestSandboxSize(t *testing.T) {
	for text, want := range map[string]int{
		"512": 512, "512m": 512, "512MB": 512, "512 MiB": 512, "1g": 1024, "1.5G": 1536, "1GiB": 1024, "0.5gb": 512, "1t": 1 << 20,
	} {
		got := sandboxSize{least: minMemory}
		if err := got.Set(text); err != nil || got.mib != want {
			t.Errorf("%q is %d, %v; want %d", text, got.mib, err, want)
		}
	}
	for _, text := range []string{"", "0", "-1", "1k", "1.5", "0.1g", "g", "1gg", "9999999t", "1e3"} {
		if err := (&sandboxSize{least: minMemory}).Set(text); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
	for _, text := range []string{"127", "0.1g", "1"} {
		if err := (&sandboxSize{least: minMemory}).Set(text); err == nil || err.Error() != "give at least 128 MiB" {
			t.Errorf("%q: %v", text, err)
		}
	}
}
