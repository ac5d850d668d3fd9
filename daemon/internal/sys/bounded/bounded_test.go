package bounded

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestText(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", ""},
		{"plain text", "plain text"},
		{"1234567890", "1234567890"},
		{"12345678901", "1234567890…"},
		{"ä€😀", "ä€😀"},
		{"ä€😀€", "ä€😀…"},
		{"a\nb\tc", "a\nb\tc"},
		{"\x1b[2J", `\x1b[2J`},
		{"\u202eabc", `\u202eabc`},
		{"a\xffb", "a\uFFFDb"},
		{"a\uFFFDb", "a\uFFFDb"},
		{`''`, `''`},
		{`""""""`, `"""""…`},
		{"'\x00'", `'\x00'`},
	} {
		if got := Text(c.in, 10); got != c.want {
			t.Errorf("Text(%q, 10) = %q, want %q", c.in, got, c.want)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("a\x1b\xff\"\\\n\u202e", 7)
	f.Fuzz(func(t *testing.T, s string, max int) {
		max &= 1<<12 - 1
		got := Text(s, max)
		if !utf8.ValidString(got) {
			t.Errorf("Text(%q, %d) = %q, which is not valid UTF-8", s, max, got)
		}
		encoded, err := json.Marshal(strings.TrimSuffix(got, "…"))
		if err != nil {
			t.Fatal(err)
		}
		// encoding/json also escapes HTML and U+2028 and U+2029, unless that is turned off.
		plain := strings.NewReplacer(`\u003c`, "<", `\u003e`, ">", `\u0026`, "&").Replace(string(encoded))
		if len(plain)-2 > max {
			t.Errorf("Text(%q, %d) takes %d bytes as JSON: %s", s, max, len(plain)-2, plain)
		}
	})
}

// hugeStringer has a text of 1 MB.
type hugeStringer struct{}

func (hugeStringer) String() string { return strings.Repeat("\x1b", 1e6) }

// Every attribute of a log line is bounded, whatever its type.
func TestLoggerBoundsEveryAttribute(t *testing.T) {
	huge := strings.Repeat("x\"\n\x1b\u009b", 1e5)
	for _, inJSON := range []bool{true, false} {
		for name, log := range map[string]func(*slog.Logger){
			"message":  func(l *slog.Logger) { l.Info(huge) },
			"string":   func(l *slog.Logger) { l.Info("m", "a", huge) },
			"error":    func(l *slog.Logger) { l.Info("m", "err", fmt.Errorf("run: %w", errors.New(huge))) },
			"bytes":    func(l *slog.Logger) { l.Info("m", "a", []byte(huge)) },
			"list":     func(l *slog.Logger) { l.Info("m", "a", []string{huge}) },
			"stringer": func(l *slog.Logger) { l.Info("m", "a", hugeStringer{}) },
			"with":     func(l *slog.Logger) { l.With("a", huge).Info("m") },
			"group":    func(l *slog.Logger) { l.WithGroup("g").Info("m", slog.Group("h", "a", huge)) },
		} {
			var out bytes.Buffer
			log(NewLogger(&out, inJSON, slog.LevelInfo))
			if out.Len() > maxAttr+200 || strings.Count(out.String(), "\n") != 1 || strings.ContainsAny(out.String(), "\x1b\u009b") {
				t.Errorf("%s, JSON %t: a line of %d bytes, want one printable line of at most about %d: %.300q", name, inJSON, out.Len(), maxAttr, out.String())
			}
			if !strings.Contains(out.String(), "…") {
				t.Errorf("%s, JSON %t: the line does not show that it was cut: %.300q", name, inJSON, out.String())
			}
		}
	}
	// Attributes of ordinary size keep their form.
	var out bytes.Buffer
	NewLogger(&out, true, slog.LevelInfo).Error("m", "err", errors.New("no"), "list", []string{"a", "b"}, "n", 7, "nothing", nil)
	var line map[string]any
	if err := json.Unmarshal(out.Bytes(), &line); err != nil {
		t.Fatal(err)
	}
	delete(line, "time")
	if got := fmt.Sprint(line); got != "map[err:no level:ERROR list:[a b] msg:m n:7 nothing:<nil>]" {
		t.Error(got)
	}
}
