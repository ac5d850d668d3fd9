package tail

import (
	"os"
	"path/filepath"
	"testing"
)

func TestRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	for content, want := range map[string]string{
		"":                     "",
		" \r\n":                "",
		"end\n":                "end",
		"a longer text ends\n": "ext ends",
		"one\r\ntwo\n":         "one\ntwo",
		"x\x1b[2J\u009b\x7f y": "[2J y",
		"b\u202ec\u2028d":      "bcd",
		"only half of an \xc3": "f of an",
		"€uro 123":             "uro 123", // the first byte read is in the middle of a character
	} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := Read(path, 9); got != want {
			t.Errorf("Read of %q = %q, want %q", content, got, want)
		}
	}
	if got := Read(filepath.Join(t.TempDir(), "missing"), 9); got != "" {
		t.Errorf("Read of a file that does not exist = %q", got)
	}
}

func TestQuote(t *testing.T) {
	for text, want := range map[string]string{
		"":                  "",
		" \n":               "",
		"one":               "\nlog: one",
		"one\ntwo\x1b[2J\n": "\nlog: one\n\ttwo[2J",
	} {
		if got := Quote("log", text); got != want {
			t.Errorf("Quote(%q) = %q, want %q", text, got, want)
		}
	}
}
