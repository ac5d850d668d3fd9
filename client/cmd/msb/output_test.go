package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/msbd/msbd/api/rpc"
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

func TestEscaper(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"a\tb\r\n":       "a\tb\r\n",
		"\x1b[2J":        "\\x1b[2J",
		"s\u00fc\u65e5":  "s\u00fc\u65e5",
		"\xff\x80":       "\\xff\\x80",
		"cut \xe6\x97":   "cut \\xe6\\x97",
		"\u202e\u0085":   "\\u202e\\u0085",
		"\x7f\x00\u200b": "\\x7f\\x00\\u200b",
	} {
		for pieces := 1; pieces <= len(text); pieces++ {
			var out strings.Builder
			e := &escaper{w: &out}
			for rest := []byte(text); len(rest) > 0; {
				n := min(pieces, len(rest))
				if _, err := e.Write(rest[:n]); err != nil {
					t.Fatal(err)
				}
				rest = rest[n:]
			}
			if err := flush(e); err != nil || out.String() != want {
				t.Errorf("%q in pieces of %d: got %q, %v, want %q", text, pieces, out.String(), err, want)
			}
		}
	}
}

func TestQueue(t *testing.T) {
	t.Parallel()
	// The order of both streams is kept while their reader pauses.
	var both strings.Builder
	paused, resume := make(chan bool, 1), make(chan bool)
	slow := writerFunc(func(p []byte) (int, error) {
		select {
		case paused <- true:
			<-resume
		default:
		}
		return both.Write(p)
	})
	q := newQueue()
	stdout, stderr := q.to(slow), q.to(&both)
	fmt.Fprint(stdout, "1")
	<-paused
	fmt.Fprint(stdout, "2")
	fmt.Fprint(stderr, "3")
	fmt.Fprint(stdout, "4")
	close(resume)
	if err := q.finish(t.Context()); err != nil || both.String() != "1234" {
		t.Errorf("got %q, %v", both.String(), err)
	}

	// The error of a write is that of later writes and of the end.
	full := errors.New("no space")
	q = newQueue()
	failing := q.to(writerFunc(func([]byte) (int, error) { return 0, full }))
	for {
		if _, err := failing.Write([]byte("x")); err != nil {
			break
		}
	}
	if err := q.finish(t.Context()); err != full {
		t.Errorf("got %v", err)
	}

	// Who abandons the queue does not wait for its reader.
	q = newQueue()
	never := q.to(writerFunc(func([]byte) (int, error) { select {} }))
	fmt.Fprint(never, "x")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := q.finish(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

type funcWriter struct{ f func([]byte) (int, error) }

func (w *funcWriter) Write(p []byte) (int, error) { return w.f(p) }

func writerFunc(f func([]byte) (int, error)) *funcWriter { return &funcWriter{f} }

func TestNameOfTheCopy(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ from, path, want string }{
		{"/tmp/result", "/tmp/.bashrc", "result"}, // the sandbox does not choose the name
		{"/tmp/dir/.", "/tmp/dir", "dir"},
		{"dir/", "/root/dir", "dir"},
		{"~", "/home/user", "user"},
		{".", "/", ""},
		{".", "/x/..", ""},
		{"..", `/a\b`, ""},
	} {
		if got := localBase(tt.from, &rpc.FileInfo{FileStat: rpc.FileStat{Path: tt.path}}); got != tt.want {
			t.Errorf("%q at %q: got %q, want %q", tt.from, tt.path, got, tt.want)
		}
	}
}
