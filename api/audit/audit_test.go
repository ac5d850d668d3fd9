package audit

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
)

var at = time.Date(2026, 1, 2, 3, 4, 5, 678_912_345, time.FixedZone("CET", 3600))

// events covers the different shapes of entries: with and without a target and details, with text that must be
// escaped or is not UTF-8, and with text that looks like the end of a line.
var events = []Event{
	{Action: ServerStart, Actor: ActorServer},
	{Action: KeyCreate, Actor: ActorUID(1000), Target: "00112233445566778899aabbccddeeff",
		Detail: map[string]string{"scopes": "sandbox:start", "namespaces": "team-alpha", "expires": "never"}},
	{Action: ImageImport, Actor: ActorUID(0), Detail: map[string]string{"path": "/srv/\xff\"<&>\u2028é\n.tar"}},
	{Action: KeyRevoke, Actor: ActorUID(4294967295), Target: `,"hash":"`},
}

func logOf(t testing.TB, events ...Event) ([]byte, Head) {
	t.Helper()
	var (
		log []byte
		h   Head
	)
	for i, e := range events {
		line, next, err := h.Append(at.Add(time.Duration(i)*time.Hour), e)
		if err != nil {
			t.Fatal(err)
		}
		log, h = append(log, line...), next
	}
	return log, h
}

// The format never changes, because people keep logs and must be able to check them later.
func TestGolden(t *testing.T) {
	log, head := logOf(t, events...)
	golden, err := os.ReadFile("testdata/audit.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(golden), string(log)); diff != "" {
		t.Error(diff)
	}
	if got, err := Verify(bytes.NewReader(golden)); got != head || err != nil {
		t.Errorf("Verify: %v, %v, want %v", got, err, head)
	}
}

// The command in the package doc prints the hash of each line without using this package.
func TestShellRecomputesTheHash(t *testing.T) {
	file, err := filepath.Abs("testdata/audit.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("audit.go")
	if err != nil {
		t.Fatal(err)
	}
	_, command, _ := strings.Cut(string(doc), "//\tsed")
	command, _, _ = strings.Cut("sed"+command, "\n")
	log, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for i, line := range strings.Split(strings.TrimSpace(string(log)), "\n") {
		e, err := Parse([]byte(line))
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sh", "-c", strings.ReplaceAll(command, "-n 3p", fmt.Sprintf("-n %dp", i+1)))
		cmd.Dir = filepath.Dir(file)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
		if sum, _, _ := strings.Cut(string(out), " "); sum != e.Hash {
			t.Errorf("line %d: %s prints %s, the entry has %s", i+1, command, sum, e.Hash)
		}
	}
}

func TestParseReturnsAppendedEvent(t *testing.T) {
	var h Head
	for i, e := range events {
		line, next, err := h.Append(at, e)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Parse(bytes.TrimSuffix(line, []byte("\n")))
		if err != nil {
			t.Fatal(err)
		}
		want := Entry{Seq: uint64(i + 1), Time: at.UTC().Truncate(time.Millisecond), Event: e, Prev: h.Hash, Hash: next.Hash}
		for name, value := range e.Detail { // Append replaces invalid UTF-8
			want.Detail[name] = strings.ToValidUTF8(value, "\ufffd")
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		h = next
	}
}

// Verify reports any change to a log at the line that was changed.
func TestVerifyFindsTampering(t *testing.T) {
	log, _ := logOf(t, events...)
	lines := strings.SplitAfter(string(log), "\n")
	forged, _, err := (Head{Seq: 1, Hash: strings.Repeat("0", 64)}).Append(at, Event{Action: KeyRevoke, Actor: "uid:1"})
	if err != nil {
		t.Fatal(err)
	}
	join := func(parts ...string) string { return strings.Join(parts, "") }
	tests := map[string]struct {
		log     string
		line    uint64
		problem string
	}{
		"changed":            {strings.Replace(string(log), "team-alpha", "team-beta", 1), 2, "hash"},
		"hash in capitals":   {join(lines[0], strings.ToUpper(lines[1])), 2, "hash"},
		"removed":            {join(lines[0], lines[2]), 2, "entry 3 is in the place of entry 2"},
		"first line removed": {join(lines[1:]...), 1, "entry 2 is in the place of entry 1"},
		"repeated":           {join(lines[0], lines[0]), 2, "entry 1 is in the place"},
		"swapped":            {join(lines[0], lines[2], lines[1]), 2, "entry 3 is in the place"},
		"replaced":           {join(lines[0], string(forged), lines[2]), 2, "changed and rehashed"},
		"truncated":          {join(lines[0], strings.TrimSuffix(lines[1], "\n")), 2, "cut off"},
		"newline changed":    {strings.Replace(string(log), "\n", " ", 1), 1, "hash"},
		"CRLF":               {strings.ReplaceAll(string(log), "\n", "\r\n"), 1, "hash"},
		"empty line":         {join(lines[0], "\n", lines[1]), 2, "hash"},
		"trailing object":    {join(string(log), "{}\n"), 5, "hash"},
		"too long":           {join(lines[0], strings.Repeat("x", MaxLine), "\n"), 2, "longer than"},
		"without newline":    {strings.Repeat("x", 10*MaxLine), 1, "longer than"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := Verify(strings.NewReader(tt.log))
			var broken *ChainError
			if !errors.As(err, &broken) || broken.Line != tt.line || !strings.Contains(err.Error(), tt.problem) {
				t.Fatalf("Verify: %v, want line %d: %s", err, tt.line, tt.problem)
			}
			valid := join(lines[:tt.line-1]...)
			if want, err := Verify(strings.NewReader(valid)); got != want || err != nil {
				t.Errorf("the valid part ends at %v, want %v, %v", got, want, err)
			}
		})
	}
}

func TestVerifyReturnsReaderError(t *testing.T) {
	bad := errors.New("bad disk")
	log, head := logOf(t, events...)
	got, err := Verify(io.MultiReader(bytes.NewReader(log), iotest.ErrReader(bad)))
	if got != head || !errors.Is(err, bad) {
		t.Errorf("Verify: %v, %v, want %v, %v", got, err, head, bad)
	}
}

func TestAppendRefusesLongEntries(t *testing.T) {
	h := Head{Seq: 7, Hash: strings.Repeat("a", 64)}
	line, _, err := h.Append(at, Event{Action: KeyPrune, Actor: ActorServer})
	if err != nil {
		t.Fatal(err)
	}
	fits := Event{Action: KeyPrune, Actor: ActorServer, Target: strings.Repeat("x", MaxLine-len(line)-len(`"target":"",`))}
	line, _, err = h.Append(at, fits)
	if err != nil || len(line) != MaxLine {
		t.Fatalf("an entry of %d bytes: %v", len(line), err)
	}
	if _, err := Parse(line[:len(line)-1]); err != nil {
		t.Error(err)
	}
	fits.Target += "x"
	if line, next, err := h.Append(at, fits); err == nil || line != nil || next != h {
		t.Errorf("an entry that is one byte too long: %d bytes, %v, %v", len(line), next, err)
	}
}

// FuzzVerify checks that only one log has a given head, that Append can continue every valid log, and that Verify
// returns a ChainError for any other input.
func FuzzVerify(f *testing.F) {
	log, head := logOf(f, events...)
	f.Add(log)
	f.Add([]byte{})
	f.Add(log[:len(log)/2])
	f.Add(bytes.ToUpper(log))
	f.Add(append(bytes.Clone(log), '\n'))
	f.Add(bytes.ReplaceAll(log, []byte(`,"hash"`), []byte(`,"hash":"","hash"`)))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := Verify(bytes.NewReader(data))
		if got == head && err == nil && !bytes.Equal(data, log) {
			t.Fatalf("a different log has the same head:\n%s", data)
		}
		if err != nil {
			var broken *ChainError
			if !errors.As(err, &broken) || broken.Line != got.Seq+1 {
				t.Fatalf("valid up to entry %d, but: %v", got.Seq, err)
			}
			return
		}
		line, next, err := got.Append(at, Event{Action: ServerStop, Actor: ActorServer})
		if err != nil {
			t.Fatal(err)
		}
		if end, err := Verify(bytes.NewReader(append(bytes.Clone(data), line...))); end != next || err != nil {
			t.Fatalf("after appending an entry: %v, %v, want %v", end, err, next)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	var (
		log bytes.Buffer
		h   Head
	)
	for range 1000 {
		line, next, err := h.Append(at, events[1])
		if err != nil {
			b.Fatal(err)
		}
		log.Write(line)
		h = next
	}
	b.SetBytes(int64(log.Len()))
	for b.Loop() {
		if got, err := Verify(bytes.NewReader(log.Bytes())); got != h || err != nil {
			b.Fatal(got, err)
		}
	}
}
