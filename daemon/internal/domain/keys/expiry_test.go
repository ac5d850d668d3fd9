package keys

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestParseExpiry(t *testing.T) {
	tests := []struct{ now, s, want string }{
		{"2026-01-10T10:00:00Z", "30s", "2026-01-10T10:00:30Z"},
		{"2026-01-10T10:00:00Z", "15m", "2026-01-10T10:15:00Z"},
		{"2026-01-10T10:00:00Z", "24h", "2026-01-11T10:00:00Z"},
		{"2026-01-10T10:00:00Z", "7d", "2026-01-17T10:00:00Z"},
		{"2026-01-10T10:00:00Z", "2w", "2026-01-24T10:00:00Z"},
		{"2026-01-10T10:00:00Z", "3mo", "2026-04-10T10:00:00Z"},
		{"2026-01-10T10:00:00Z", "1y", "2027-01-10T10:00:00Z"},
		{"2026-01-10T10:00:00Z", "1w2d", "2026-01-19T10:00:00Z"},
		{"2026-01-10T10:00:00Z", "1y2mo3d4h5m6s", "2027-03-13T14:05:06Z"},
		{"2026-01-10T10:00:00Z", "007d", "2026-01-17T10:00:00Z"},
		{"2026-01-10T10:00:00Z", "1.5h", "2026-01-10T11:30:00Z"},
		{"2026-01-10T10:00:00Z", "0.001s", "2026-01-10T10:00:00.001Z"},
		{"2026-01-10T10:00:00Z", "1.125d1.5s", "2026-01-11T13:00:01.5Z"},
		{"2026-01-31T10:00:00Z", "1mo", "2026-02-28T10:00:00Z"},
		{"2024-01-31T10:00:00Z", "1mo", "2024-02-29T10:00:00Z"},
		{"2024-02-29T10:00:00Z", "1y", "2025-02-28T10:00:00Z"},
		{"2026-10-31T10:00:00Z", "13mo", "2027-11-30T10:00:00Z"},
		{"2026-12-31T10:00:00Z", "2mo", "2027-02-28T10:00:00Z"},
		{"2026-01-31T23:30:00-02:00", "1mo", "2026-03-01T01:30:00Z"}, // months are counted in UTC
		{"2026-01-10T10:00:00Z", "7973y", "9999-01-10T10:00:00Z"},
	}
	for _, tt := range tests {
		now, err := time.Parse(time.RFC3339, tt.now)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseExpiry(tt.s, now)
		if err != nil || got.Format(time.RFC3339Nano) != tt.want {
			t.Errorf("%s after %s is %s, %v; want %s", tt.s, tt.now, got.Format(time.RFC3339Nano), err, tt.want)
		}
	}
	if got, err := ParseExpiry("", time.Now()); err != nil || !got.IsZero() {
		t.Errorf("an empty expiry is %s, %v", got, err)
	}
}

func TestParseExpiryRefuses(t *testing.T) {
	now := time.Date(2026, 1, 10, 10, 0, 0, 0, time.UTC)
	for s, want := range map[string]string{
		"7":                                "has no unit",
		"1w2":                              "has no unit",
		"3fortnights":                      "unknown unit",
		"3M":                               "unknown unit",
		"1d 2h":                            "unknown unit",
		".5h":                              "at most three decimals",
		"1.h":                              "at most three decimals",
		"1.5.5h":                           "at most three decimals",
		"1.2345h":                          "at most three decimals",
		"1.5mo":                            "whole number",
		"0.5y":                             "whole number",
		"0.000h":                           "zero",
		"d":                                "put a number",
		"+1d":                              "put a number",
		" 1d":                              "put a number",
		"never":                            "put a number",
		"1dh":                              "unknown unit",
		"٣d":                               "put a number",
		"-1d":                              "negative",
		"0s":                               "zero",
		"1w0d":                             "zero",
		"7974y":                            "year 9999",
		"9999y":                            "year 9999",
		"999999999999mo":                   "year 9999",
		"999999999999w":                    "year 9999",
		"9223372036854775807s":             "year 9999",
		"18446744073709551617s":            "year 9999",
		"5000y5000y":                       "year 9999",
		strings.Repeat("9", 1e6) + "s":     "year 9999",
		strings.Repeat("x", 1e6):           "put a number",
		"1" + strings.Repeat("\x00", 1000): "unknown unit",
	} {
		_, err := ParseExpiry(s, now)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) || len(err.Error()) > 500 {
			t.Errorf("%.40q: %v, want a short error with %q", s, err, want)
		}
	}
}

func TestParseAge(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ now, s, want string }{
		{"2026-01-10T10:00:00Z", "90d", "2025-10-12T10:00:00Z"},
		{"2026-01-10T10:00:00Z", "1w2d", "2026-01-01T10:00:00Z"},
		{"2026-01-10T10:00:00Z", "36h30s", "2026-01-08T21:59:30Z"},
		{"2026-03-31T10:00:00Z", "1mo", "2026-02-28T10:00:00Z"},
		{"2024-03-31T10:00:00Z", "1mo", "2024-02-29T10:00:00Z"},
		{"2024-02-29T10:00:00Z", "1y", "2023-02-28T10:00:00Z"},
		{"2026-01-31T10:00:00Z", "2mo", "2025-11-30T10:00:00Z"},
		{"2026-01-10T10:00:00Z", "2025y", "0001-01-10T10:00:00Z"},
		{"2026-01-10T10:00:00+02:00", "", "2026-01-10T08:00:00Z"},
	} {
		now, err := time.Parse(time.RFC3339, tt.now)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseAge("dead-for", tt.s, now)
		if err != nil || got.Format(time.RFC3339Nano) != tt.want {
			t.Errorf("%s before %s is %s, %v; want %s", tt.s, tt.now, got.Format(time.RFC3339Nano), err, tt.want)
		}
	}
	now := time.Date(2026, 1, 10, 10, 0, 0, 0, time.UTC)
	for s, want := range map[string]string{
		"90": "has no unit", "-1d": "negative", "0d": "zero", "1x": "unknown unit", "2026y": "before the year 1",
		"999999999999w": "before the year 1", "9999999999999s": "before the year 1", "30d ": "unknown unit",
	} {
		if _, err := ParseAge("dead-for", s, now); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "dead-for ") {
			t.Errorf("%q: %v, want %q", s, err, want)
		}
	}
}

func FuzzParseExpiry(f *testing.F) {
	for _, s := range []string{"", "1w2d", "3mo", "1y", "0s", "-1s", "999999999999mo", "5000y5000y"} {
		f.Add(s, int64(1767225600))
	}
	f.Fuzz(func(t *testing.T, s string, sec int64) {
		now := time.Unix(sec%200e9, 0)
		got, err := ParseExpiry(s, now)
		if err == nil && s != "" && (!got.After(now) || got.Year() > lastYear) {
			t.Errorf("%q after %s is %s", s, now, got)
		}
		got, err = ParseAge("dead-for", s, now)
		if err == nil && s != "" && (!got.Before(now) || got.Year() < 1) {
			t.Errorf("%q before %s is %s", s, now, got)
		}
	})
}
