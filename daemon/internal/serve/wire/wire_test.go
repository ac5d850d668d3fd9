package wire

import (
	"github.com/go-json-experiment/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

func TestFileInfo(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 678, time.FixedZone("", 3600))
	for name, c := range map[string]struct {
		in   sandbox.FileInfo
		want string
	}{
		"file": {
			sandbox.FileInfo{Path: "/ä", Type: sandbox.RegularFile, Size: 5, Mode: 0o4755, UID: 1, GID: math.MaxUint32, User: "u", Group: "g", ModifiedAt: at},
			`{"path":"/ä","type":"file","size":5,"mode":"4755","uid":1,"gid":4294967295,"user":"u","group":"g","modified_at":"2026-01-02T02:04:05.000000678Z"}`,
		},
		"not UTF-8": {
			sandbox.FileInfo{Path: "/\xff", Type: sandbox.Directory, Mode: 0o7, LinkTarget: "\xfe", ModifiedAt: at.Truncate(time.Second)},
			`{"path":"/` + "\uFFFD" + `","path_base64":"L/8=","type":"directory","size":0,"mode":"0007","uid":0,"gid":0,"user":"","group":"",` +
				`"modified_at":"2026-01-02T02:04:05Z","link_target":"` + "\uFFFD" + `"}`,
		},
		"link": {
			sandbox.FileInfo{
				Path: "/l", Type: sandbox.Symlink, LinkTarget: "t", ModifiedAt: at.Truncate(time.Second),
				Target: &sandbox.FileInfo{Path: "/t", Type: sandbox.OtherFile, ModifiedAt: at.Truncate(time.Second), Target: &sandbox.FileInfo{Path: "/never"}},
			},
			`{"path":"/l","type":"symlink","size":0,"mode":"0000","uid":0,"gid":0,"user":"","group":"","modified_at":"2026-01-02T02:04:05Z","link_target":"t",` +
				`"target":{"path":"/t","type":"other","size":0,"mode":"0000","uid":0,"gid":0,"user":"","group":"","modified_at":"2026-01-02T02:04:05Z"}}`,
		},
		"hostile": {
			sandbox.FileInfo{Path: "/", Size: -1, Mode: math.MaxUint32, User: strings.Repeat("\x1b", 100), ModifiedAt: time.Unix(math.MaxInt64/2, 0)},
			`{"path":"/","type":"","size":0,"mode":"7777","uid":0,"gid":0,"user":"` + strings.Repeat(`\\x1b`, 51) + `…","group":"","modified_at":"0001-01-01T00:00:00Z"}`,
		},
	} {
		got, err := json.Marshal(FileInfo(c.in))
		if diff := cmp.Diff(decode(t, c.want), decode(t, string(got))); diff != "" || err != nil {
			t.Errorf("%s: error %v, (-want +got):\n%s", name, err, diff)
		}
	}
}

// decode decodes the description of a file.
func decode(t *testing.T, text string) (info rpc.FileInfo) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &info); err != nil {
		t.Fatal(text, err)
	}
	return info
}

func TestExit(t *testing.T) {
	for in, want := range map[sandbox.Exit]rpc.ProcessExit{
		{Code: 3}: {ExitCode: 3},
		{Code: 137, Signal: 9, Reason: "\x1bmemory"}:   {ExitCode: 137, Signal: "KILL", Reason: `\x1bmemory`},
		{Code: 143, Signal: 15, TimedOut: true}:        {ExitCode: 143, Signal: "TERM", TimedOut: true},
		{Signal: 99}:                                   {Signal: "99"},
		{Code: 1, Reason: strings.Repeat("x", 10_000)}: {ExitCode: 1, Reason: strings.Repeat("x", maxText) + "…"},
	} {
		if got := Exit(in); got != want {
			t.Errorf("%+v became %+v, want %+v", in, got, want)
		}
	}
}

func TestFileChange(t *testing.T) {
	if diff := cmp.Diff(rpc.FSChange{Type: "rename", Path: "a\uFFFD", PathBase64: []byte("a\xff")}, FileChange(sandbox.FileChange{Type: sandbox.FileRenamed, Path: "a\xff"})); diff != "" {
		t.Error(diff)
	}
}

func TestCount(t *testing.T) {
	if Count(7) != 7 || Count(math.MaxUint64) != math.MaxInt {
		t.Error(Count(7), Count(math.MaxUint64))
	}
}
