package rpc

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

func output(stream sandbox.Stream, data string) sandbox.Output {
	return sandbox.Output{Stream: stream, Data: []byte(data)}
}

func unlimited(int) error { return nil }

func TestLines(t *testing.T) {
	const out, err = sandbox.Stdout, sandbox.Stderr
	for name, tt := range map[string]struct {
		outputs []sandbox.Output
		want    []rpc.Line
	}{
		"no output":             {want: []rpc.Line{}},
		"a line":                {[]sandbox.Output{output(out, "a\n")}, []rpc.Line{{Stream: "stdout", Text: "a"}}},
		"no newline at the end": {[]sandbox.Output{output(out, "a\nb")}, []rpc.Line{{Stream: "stdout", Text: "a"}, {Stream: "stdout", Text: "b"}}},
		"empty lines":           {[]sandbox.Output{output(out, "\n\n")}, []rpc.Line{{Stream: "stdout"}, {Stream: "stdout"}}},
		"order of completion": {
			[]sandbox.Output{output(out, "a"), output(err, "x\n"), output(out, "b\n"), output(err, "y")},
			[]rpc.Line{{Stream: "stderr", Text: "x"}, {Stream: "stdout", Text: "ab"}, {Stream: "stderr", Text: "y"}},
		},
		"carriage return is kept": {[]sandbox.Output{output(out, "a\r\n")}, []rpc.Line{{Stream: "stdout", Text: "a\r"}}},
		"character in two parts":  {[]sandbox.Output{output(out, "\xc3"), output(out, "\xa4\n")}, []rpc.Line{{Stream: "stdout", Text: "ä"}}},
		"not UTF-8":               {[]sandbox.Output{output(out, "a\xff\n")}, []rpc.Line{{Stream: "stdout", Text: "a\uFFFD"}}},
	} {
		t.Run(name, func(t *testing.T) {
			l := lines{quota: quota{reserve: unlimited}}
			for _, o := range tt.outputs {
				if err := l.add(o); err != nil {
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
			l := lines{quota: quota{reserve: unlimited}}
			for range maxOutput>>16 + 1 {
				if err := l.add(output(sandbox.Stdout, data)); err != nil {
					if e, ok := errors.AsType[*rpc.Error](err); !ok || e.Code != rpc.CodeExhausted {
						t.Error(err)
					}
					return
				}
			}
			t.Error("lines accepted more than maxOutput")
		})
	}
}

// The lines do not depend on how the output is split.
func FuzzLines(f *testing.F) {
	f.Add("a\nb\r\n\n\xffc", uint8(3))
	f.Fuzz(func(t *testing.T, text string, size uint8) {
		l := lines{quota: quota{reserve: unlimited}}
		for rest := text; rest != ""; {
			n := min(int(size)+1, len(rest))
			if err := l.add(output(sandbox.Stderr, rest[:n])); err != nil {
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
				t.Errorf("line %q is not valid UTF-8", line.Text)
			}
		}
	})
}

// lines reserves the encoded size of output before it keeps it, and keeps nothing if that fails.
func TestLinesAreKept(t *testing.T) {
	errFull := errors.New("full")
	reserved := 0
	l := lines{quota: quota{reserve: func(n int) error {
		if reserved += n; reserved > 1000 {
			return errFull
		}
		return nil
	}}}
	if err := l.add(output(sandbox.Stdout, "a\x00\"\n")); err != nil || reserved != 4+lineCost+5+1 {
		t.Errorf("reserved %d, want %d, error %v", reserved, 4+lineCost+5+1, err)
	}
	if err := l.add(output(sandbox.Stderr, strings.Repeat("x", 1000))); err != errFull {
		t.Errorf("got error %v, want that of reserve", err)
	}
	if diff := cmp.Diff([]rpc.Line{{Stream: "stdout", Text: "a\x00\""}}, l.end()); diff != "" {
		t.Error(diff)
	}
}

func TestHeadTail(t *testing.T) {
	const middle = "\n[… %d bytes of the output are left out here; to read them, write the output to a file and print parts of it …]\n"
	for _, c := range []struct {
		text string
		half int
		want string
	}{
		{"", 2, ""},
		{"abcd", 2, "abcd"},
		{"abcde", 2, "ab" + fmt.Sprintf(middle, 1) + "de"},
		{"a", 0, fmt.Sprintf(middle, 1)},
		{"é€é", 3, "é" + fmt.Sprintf(middle, 3) + "é"},
		{"é€é", 4, "é€é"},
		{"a\xffé\xff", 1, "a" + fmt.Sprintf(middle, 3) + "\uFFFD"},
		{"😀😀😀", 5, "😀" + fmt.Sprintf(middle, 4) + "😀"},
	} {
		for _, size := range []int{1, 2, 100} { // of the pieces
			h := headTail{half: c.half}
			for piece := range slices.Chunk([]byte(c.text), size) {
				h.Write(piece)
			}
			if got := h.String(); got != c.want {
				t.Errorf("%q, half %d, pieces of %d: got %q, want %q", c.text, c.half, size, got, c.want)
			}
		}
	}
	h := headTail{half: 1000}
	for range 1000 {
		h.Write(make([]byte, 3000))
	}
	if held := cap(h.head) + cap(h.tail); held > 8000 || h.size != 3e6 {
		t.Errorf("holds %d bytes of %d", held, h.size)
	}
}

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
	read := func(p sandbox.Process, out sink) (output []rpc.Line, exit *sandbox.Exit, err error) {
		_, exit, err = collect(p, out)
		return out.end(), exit, err
	}
	newLines := func() sink { return &lines{quota: quota{reserve: unlimited}} }
	newExcerpt := func() sink {
		e, err := newExcerpt(1000, unlimited)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	both := start("sh", "-c", "echo out; echo err >&2; exit 3")
	output, exit, err := read(both, newLines())
	if diff := cmp.Diff([]rpc.Line{{Stream: "stdout", Text: "out"}, {Stream: "stderr", Text: "err"}}, output); diff != "" || exit.Code != 3 || err != nil {
		t.Errorf("exit %+v, error %v, output (-want +got):\n%s", exit, err, diff)
	}
	output, _, err = read(start("sh", "-c", "echo out; echo err >&2"), newExcerpt())
	if diff := cmp.Diff([]rpc.Line{{Stream: "stdout", Text: "out\nerr"}}, output); diff != "" || err != nil {
		t.Errorf("excerpt of a short output: error %v, output (-want +got):\n%s", err, diff)
	}
	output, _, err = read(start("sh", "-c", "echo out; echo err >&2"), &pieces{quota: quota{reserve: unlimited}})
	if diff := cmp.Diff([]rpc.Line{{Stream: "stdout", Base64: []byte("out\n")}, {Stream: "stderr", Base64: []byte("err\n")}}, output); diff != "" || err != nil {
		t.Errorf("pieces: error %v, output (-want +got):\n%s", err, diff)
	}
	if output, _, err := read(start("true"), newExcerpt()); err != nil || len(output) != 0 {
		t.Errorf("excerpt of no output: %+v, error %v", output, err)
	}
	for name, out := range map[string]sink{"excerpt": newExcerpt(), "lines": newLines(), "pieces": &pieces{quota: quota{reserve: unlimited}}} {
		if _, _, err := read(start("yes"), out); err == nil || !strings.Contains(err.Error(), "16 MiB") {
			t.Errorf("%s of endless output: got error %v, want the 16 MiB limit", name, err)
		}
	}
	if _, _, err := read(start("nope"), newLines()); !errors.Is(err, sandbox.ErrCommandNotFound) {
		t.Errorf("unknown command: got error %v, want ErrCommandNotFound", err)
	}
	if _, exit, err := read(&noExit{}, newLines()); err != nil || exit != nil {
		t.Errorf("events without an exit: got exit %v, error %v", exit, err)
	}
}

// noExit is a process whose events end without an exit.
type noExit struct{}

func (*noExit) Next() (sandbox.Event, error) { return nil, io.EOF }
func (*noExit) Close() error                 { return nil }
