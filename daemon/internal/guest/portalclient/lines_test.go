package portalclient

import (
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

func piece(stream portalv1.Output_Stream, data string) *portalv1.Output {
	return &portalv1.Output{Stream: stream, Data: []byte(data)}
}

func TestLines(t *testing.T) {
	const out, err = portalv1.Output_STREAM_STDOUT, portalv1.Output_STREAM_STDERR
	for name, tt := range map[string]struct {
		pieces []*portalv1.Output
		want   []sandbox.Line
	}{
		"nothing":               {},
		"a line":                {[]*portalv1.Output{piece(out, "a\n")}, []sandbox.Line{{Stream: sandbox.Stdout, Text: "a"}}},
		"no newline at the end": {[]*portalv1.Output{piece(out, "a\nb")}, []sandbox.Line{{Stream: sandbox.Stdout, Text: "a"}, {Stream: sandbox.Stdout, Text: "b"}}},
		"empty lines":           {[]*portalv1.Output{piece(out, "\n\n")}, []sandbox.Line{{Stream: sandbox.Stdout}, {Stream: sandbox.Stdout}}},
		"order of completion": {
			[]*portalv1.Output{piece(out, "a"), piece(err, "x\n"), piece(out, "b\n"), piece(err, "y")},
			[]sandbox.Line{{Stream: sandbox.Stderr, Text: "x"}, {Stream: sandbox.Stdout, Text: "ab"}, {Stream: sandbox.Stderr, Text: "y"}},
		},
		"carriage return is text": {[]*portalv1.Output{piece(out, "a\r\n")}, []sandbox.Line{{Stream: sandbox.Stdout, Text: "a\r"}}},
		"character in two pieces": {[]*portalv1.Output{piece(out, "\xc3"), piece(out, "\xa4\n")}, []sandbox.Line{{Stream: sandbox.Stdout, Text: "ä"}}},
		"not UTF-8":               {[]*portalv1.Output{piece(out, "a\xff\n")}, []sandbox.Line{{Stream: sandbox.Stdout, Text: "a\uFFFD"}}},
	} {
		t.Run(name, func(t *testing.T) {
			var l lines
			for _, p := range tt.pieces {
				if err := l.add(p); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(tt.want, l.end()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestLinesAreBounded(t *testing.T) {
	for name, data := range map[string]string{
		"one long line": strings.Repeat("x", 1<<16),
		"empty lines":   strings.Repeat("\n", 1<<16),
		"escapes":       strings.Repeat("\x01", 1<<16),
	} {
		t.Run(name, func(t *testing.T) {
			var l lines
			for range MaxOutput>>16 + 1 {
				if err := l.add(piece(portalv1.Output_STREAM_STDOUT, data)); err != nil {
					if !errors.Is(err, sandbox.ErrOutputLimit) {
						t.Error(err)
					}
					return
				}
			}
			t.Error("more than MaxOutput was taken")
		})
	}
}

// However output is cut into pieces, its lines are the same.
func FuzzLines(f *testing.F) {
	f.Add("a\nb\r\n\n\xffc", uint8(3))
	f.Fuzz(func(t *testing.T, text string, size uint8) {
		var l lines
		for rest := text; rest != ""; {
			n := min(int(size)+1, len(rest))
			if err := l.add(piece(portalv1.Output_STREAM_STDERR, rest[:n])); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		var want []sandbox.Line
		if text != "" {
			for _, s := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
				want = append(want, sandbox.Line{Stream: sandbox.Stderr, Text: strings.ToValidUTF8(s, "\uFFFD")})
			}
		}
		got := l.end()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		for _, line := range got {
			if !utf8.ValidString(line.Text) {
				t.Errorf("line %q is not UTF-8", line.Text)
			}
		}
	})
}

// What is held is told before it is, in the size that it has in an answer, and no further than whoever keeps it allows.
func TestLinesAreKept(t *testing.T) {
	full := errors.New("full")
	kept := 0
	l := lines{keep: func(n int) error {
		if kept += n; kept > 1000 {
			return full
		}
		return nil
	}}
	if err := l.add(piece(portalv1.Output_STREAM_STDOUT, "a\x00\"\n")); err != nil || kept != 4+lineCost+5+1 {
		t.Errorf("%v, kept %d", err, kept)
	}
	if err := l.add(piece(portalv1.Output_STREAM_STDERR, strings.Repeat("x", 1000))); err != full {
		t.Error(err)
	}
	if diff := cmp.Diff([]sandbox.Line{{Stream: sandbox.Stdout, Text: "a\x00\""}}, l.end()); diff != "" {
		t.Error(diff)
	}
}
