package rpc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
	"github.com/msbd/msbd/daemon/internal/serve/wire"
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
		"order of beginnings": {
			[]sandbox.Output{output(out, "a"), output(err, "x\n"), output(out, "b\n"), output(err, "y")},
			[]rpc.Line{{Stream: "stdout", Text: "ab"}, {Stream: "stderr", Text: "x"}, {Stream: "stderr", Text: "y"}},
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

// The output of an error has at most half bytes from the beginning and half from the end, and no half characters.
func TestHeadAndTail(t *testing.T) {
	text := func(texts ...string) (all []rpc.Line) {
		for _, s := range texts {
			all = append(all, rpc.Line{Stream: "stdout", Text: s})
		}
		return all
	}
	pieces := func(texts ...string) (all []rpc.Line) {
		for _, s := range texts {
			all = append(all, rpc.Line{Stream: "stderr", Base64: []byte(s)})
		}
		return all
	}
	for _, c := range []struct {
		output []rpc.Line
		half   int
		want   []rpc.Line
		cut    bool
	}{
		{[]rpc.Line{}, 4, []rpc.Line{}, false},
		{text("abc", "def"), 4, text("abc", "def"), false},
		{text("abc", "", "def"), 4, text("abc", "def"), true},
		{text("abcd", "efgh"), 4, text("abcd", "efgh"), true},
		{text("ab", "cd", "ef", "gh"), 4, text("ab", "c", "f", "gh"), true},
		{text("abcdefghij"), 4, text("abcd", "ghij"), true},
		{text("", "", "", "", ""), 2, text("", "", "", ""), true},
		{text("äöü", "äöü"), 3, text("ä", "ü"), true},
		{text("😀", "😀"), 3, text("", ""), true},
		{pieces("abcdef", "ghijkl"), 4, pieces("abcd", "ijkl"), true},
		{pieces("ab", "cd", "ef", "gh"), 4, pieces("ab", "c", "f", "gh"), true},
	} {
		got, cut := headAndTail(c.output, c.half)
		if diff := cmp.Diff(c.want, got); diff != "" || cut != c.cut {
			t.Errorf("%+v, half %d: cut %t, want %t, output (-want +got):\n%s", c.output, c.half, cut, c.cut, diff)
		}
	}
}

func FuzzHeadAndTail(f *testing.F) {
	f.Add("one\ntwö\n\nthree", uint8(4))
	f.Fuzz(func(t *testing.T, text string, half uint8) {
		l := lines{quota: quota{reserve: unlimited}}
		if err := l.add(output(sandbox.Stdout, text)); err != nil {
			t.Fatal(err)
		}
		all := l.end()
		kept, cut := headAndTail(all, int(half))
		size := 0
		for _, line := range kept {
			if size += len(line.Text); !utf8.ValidString(line.Text) {
				t.Errorf("%q is not valid UTF-8", line.Text)
			}
		}
		if cut && size > 2*int(half) || !cut && !cmp.Equal(all, kept) {
			t.Errorf("%q, half %d: cut %t: %+v", text, half, cut, kept)
		}
	})
}

// The text of events does not depend on how the output is split.
func FuzzEventText(f *testing.F) {
	f.Add("a\xc3\xa4\xff\xe2\x82", uint8(1))
	f.Add("😀\xf0\x9f", uint8(2))
	f.Fuzz(func(t *testing.T, text string, size uint8) {
		w := httptest.NewRecorder()
		sink := &eventSink{
			events:     &events{w: w, begun: true, silence: time.NewTimer(maxSilence), cancel: func(error) {}},
			incomplete: map[sandbox.Stream][]byte{},
		}
		for piece := range slices.Chunk([]byte(text), int(size)+1) {
			if err := sink.add(sandbox.Output{Stream: sandbox.Stderr, Data: piece}); err != nil {
				t.Fatal(err)
			}
		}
		sink.end()
		var got strings.Builder
		for data := range strings.SplitSeq(w.Body.String(), "\n\n") {
			data, ok := strings.CutPrefix(data, "event: output\ndata: ")
			if !ok {
				continue
			}
			var line rpc.Line
			if err := json.Unmarshal([]byte(data), &line); err != nil || line.Stream != "stderr" || line.Text == "" {
				t.Fatalf("%q: %+v, %v", data, line, err)
			}
			got.WriteString(line.Text)
		}
		if want := string([]rune(text)); got.String() != want {
			t.Errorf("%q in pieces of %d: got %q, want %q", text, size+1, got.String(), want)
		}
	})
}

func TestHeadTail(t *testing.T) {
	const rest = "ask for them"
	const middle = "\n[… %d bytes of the output are left out here; " + rest + " …]\n"
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
			if got := h.String(rest); got != c.want {
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

// An excerpt that leaves something out has a file with all of the output, however that is divided into pieces.
func TestExcerptWithFile(t *testing.T) {
	text := strings.Repeat("line\n", 4) + "end"
	for _, wanted := range []int{2, 10, len(text), 100} {
		for _, size := range []int{1, 3, 7, 100} { // of the pieces
			var written bytes.Buffer
			e := &wire.Excerpt{Bytes: wanted}
			out, err := newExcerpt(e, func() *outputFile {
				r, w := io.Pipe()
				f := &outputFile{wait: func(f func()) { f() }, cancel: func() {}, pipe: w, written: make(chan error, 1)}
				go func() {
					_, err := io.Copy(&written, r)
					f.written <- err
				}()
				return f
			}, unlimited)
			if err != nil {
				t.Fatal(err)
			}
			for piece := range slices.Chunk([]byte(text), size) {
				if err := out.add(sandbox.Output{Stream: sandbox.Stdout, Data: piece}); err != nil {
					t.Fatal(err)
				}
			}
			lines := out.end()
			cut := strings.Contains(lines[0].Text, "left out")
			if kept := e.File != nil; kept != cut || kept && (strings.TrimSuffix(written.String(), "\n") != text || e.File.Size != written.Len()) || !cut && lines[0].Text != text {
				t.Errorf("%d bytes wanted, pieces of %d: text %q, file %+v with %q", wanted, size, lines[0].Text, e.File, written.String())
			}
		}
	}
}

func TestCollect(t *testing.T) {
	guest, err := sandboxtest.NewGuest().Connect(t.Context(), nil, nil)
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
		_, exit, err = collect(p, out, &reports{})
		return out.end(), exit, err
	}
	newLines := func() sink { return &lines{quota: quota{reserve: unlimited}} }
	newExcerpt := func() sink {
		e, err := newExcerpt(&wire.Excerpt{Bytes: 1000}, nil, unlimited)
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

// A line is where it began, so that a question stands before the error that follows it.
func TestLinesAreInTheOrderOfTheirBeginnings(t *testing.T) {
	l := &lines{quota: quota{reserve: unlimited}}
	for _, out := range []sandbox.Output{
		{Stream: sandbox.Stdout, Data: []byte("first\na")}, {Stream: sandbox.Stderr, Data: []byte("error\nunfinished")},
		{Stream: sandbox.Stdout, Data: []byte("b")}, {Stream: sandbox.Stdout, Data: []byte("c\nname? ")}, {Stream: sandbox.Stderr, Data: []byte(" error\n")},
	} {
		if err := l.add(out); err != nil {
			t.Fatal(err)
		}
	}
	want := []rpc.Line{
		{Stream: "stdout", Text: "first"}, {Stream: "stdout", Text: "abc"}, {Stream: "stderr", Text: "error"}, {Stream: "stderr", Text: "unfinished error"},
		{Stream: "stdout", Text: "name? "},
	}
	if diff := cmp.Diff(want, l.end()); diff != "" {
		t.Errorf("lines (-want +got):\n%s", diff)
	}
}
