package rpc

import (
	"errors"
	"io"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

func piece(stream sandbox.Stream, data string) sandbox.Output {
	return sandbox.Output{Stream: stream, Data: []byte(data)}
}

func unbounded(int) error { return nil }

func TestLines(t *testing.T) {
	const out, err = sandbox.Stdout, sandbox.Stderr
	for name, tt := range map[string]struct {
		pieces []sandbox.Output
		want   []rpc.Line
	}{
		"nothing":               {want: []rpc.Line{}},
		"a line":                {[]sandbox.Output{piece(out, "a\n")}, []rpc.Line{{Stream: "stdout", Text: "a"}}},
		"no newline at the end": {[]sandbox.Output{piece(out, "a\nb")}, []rpc.Line{{Stream: "stdout", Text: "a"}, {Stream: "stdout", Text: "b"}}},
		"empty lines":           {[]sandbox.Output{piece(out, "\n\n")}, []rpc.Line{{Stream: "stdout"}, {Stream: "stdout"}}},
		"order of completion": {
			[]sandbox.Output{piece(out, "a"), piece(err, "x\n"), piece(out, "b\n"), piece(err, "y")},
			[]rpc.Line{{Stream: "stderr", Text: "x"}, {Stream: "stdout", Text: "ab"}, {Stream: "stderr", Text: "y"}},
		},
		"carriage return is text": {[]sandbox.Output{piece(out, "a\r\n")}, []rpc.Line{{Stream: "stdout", Text: "a\r"}}},
		"character in two pieces": {[]sandbox.Output{piece(out, "\xc3"), piece(out, "\xa4\n")}, []rpc.Line{{Stream: "stdout", Text: "ä"}}},
		"not UTF-8":               {[]sandbox.Output{piece(out, "a\xff\n")}, []rpc.Line{{Stream: "stdout", Text: "a\uFFFD"}}},
	} {
		t.Run(name, func(t *testing.T) {
			l := lines{hold: unbounded}
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
			l := lines{hold: unbounded}
			for range maxOutput>>16 + 1 {
				if err := l.add(piece(sandbox.Stdout, data)); err != nil {
					if e, ok := errors.AsType[*rpc.Error](err); !ok || e.Code != rpc.CodeExhausted {
						t.Error(err)
					}
					return
				}
			}
			t.Error("more than maxOutput was taken")
		})
	}
}

// However output is cut into pieces, its lines are the same.
func FuzzLines(f *testing.F) {
	f.Add("a\nb\r\n\n\xffc", uint8(3))
	f.Fuzz(func(t *testing.T, text string, size uint8) {
		l := lines{hold: unbounded}
		for rest := text; rest != ""; {
			n := min(int(size)+1, len(rest))
			if err := l.add(piece(sandbox.Stderr, rest[:n])); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		want := []rpc.Line{}
		if text != "" {
			for _, s := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
				want = append(want, rpc.Line{Stream: "stderr", Text: strings.ToValidUTF8(s, "\uFFFD")})
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
	l := lines{hold: func(n int) error {
		if kept += n; kept > 1000 {
			return full
		}
		return nil
	}}
	if err := l.add(piece(sandbox.Stdout, "a\x00\"\n")); err != nil || kept != 4+lineCost+5+1 {
		t.Errorf("%v, kept %d", err, kept)
	}
	if err := l.add(piece(sandbox.Stderr, strings.Repeat("x", 1000))); err != full {
		t.Error(err)
	}
	if diff := cmp.Diff([]rpc.Line{{Stream: "stdout", Text: "a\x00\""}}, l.end()); diff != "" {
		t.Error(diff)
	}
}

// An endless process is closed by whoever has collected enough of it; one that ends without an exit is an error.
func TestCollect(t *testing.T) {
	guest, err := sandboxtest.NewGuest().Connect(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	start := func(program string, args ...string) sandbox.Process {
		t.Helper()
		p, err := guest.RunCommand(t.Context(), sandbox.Command{Program: program, Args: args})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		return p
	}
	output, code, err := collect(start("sh", "-c", "echo out; echo err >&2; exit 3"), unbounded)
	if diff := cmp.Diff([]rpc.Line{{Stream: "stdout", Text: "out"}, {Stream: "stderr", Text: "err"}}, output); diff != "" || code != 3 || err != nil {
		t.Errorf("%d, %v\n%s", code, err, diff)
	}
	if _, _, err := collect(start("yes"), unbounded); err == nil || !strings.Contains(err.Error(), "16 MiB") {
		t.Errorf("endless output: %v", err)
	}
	if _, _, err := collect(start("nope"), unbounded); !errors.Is(err, sandbox.ErrCommandNotFound) {
		t.Errorf("no such command: %v", err)
	}
	if _, _, err := collect(&noExit{}, unbounded); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("no exit: %v", err)
	}
}

type noExit struct{}

func (*noExit) Next() (sandbox.Event, error) { return nil, io.EOF }
func (*noExit) Close() error                 { return nil }
