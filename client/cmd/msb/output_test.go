package main

import (
	"strings"
	"testing"
	"time"
)

func TestPrintable(t *testing.T) {
	for text, want := range map[string]string{
		"plain text, Größe, 日本": "plain text, Größe, 日本",
		"two\nlines\tand a tab": "two\nlines\tand a tab",
		"\x1b[2J\x07\r\x00":     `\x1b[2J\a\r\x00`,
		"a\u202eb\u200bc":       `a\u202eb\u200bc`,
		"\u009b31m":             `\u009b31m`,
		"it's":                  "it's",
	} {
		if got := printable(text); got != want {
			t.Errorf("printable(%q) = %q, want %q", text, got, want)
		}
	}
}

func TestTable(t *testing.T) {
	var out strings.Builder
	if err := printTable(&out, [][]string{{"A", "LONG"}, {"much longer", ""}, {"x\x1by", "two\nlines"}}); err != nil {
		t.Fatal(err)
	}
	if want := "A            LONG\nmuch longer\nx\\x1by       two\nlines\n"; out.String() != want {
		t.Errorf("got\n%s", out.String())
	}
}

func TestAge(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 59 * time.Second: "59s", 90 * time.Second: "1m30s", 25 * time.Hour: "1d1h", 59*time.Minute + 59*time.Second: "59m59s",
		23*time.Hour + 59*time.Minute: "23h59m", 364 * 24 * time.Hour: "364d0h", 400 * 24 * time.Hour: "1y35d",
	} {
		if got := age(d); got != want {
			t.Errorf("age(%s) = %s, want %s", d, got, want)
		}
	}
}
