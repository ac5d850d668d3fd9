package mcp

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// Models write, read, list and remove files.
func TestFiles(t *testing.T) {
	s := newSite(t)
	call := func(tool, arguments string) []string {
		t.Helper()
		return contents(s.callTool(t, tool, `{"sandbox":"a",`+arguments+`}`))
	}
	if got := call("sandbox_write_file", `"path":"/tmp/run.sh","content":"echo é\n","mode":"0755"`); !strings.Contains(got[0], `"mode":"0755"`) || s.file(t, "/tmp/run.sh") != "echo é\n" {
		t.Errorf("write: %q", got)
	}
	s.putFile(t, "/tmp/empty", "")
	s.putFile(t, "/tmp/long", strings.Repeat("é", 50_000))
	s.putFile(t, "/tmp/binary", "\x7fELF\x00\xff")
	s.putFile(t, "/tmp/latin", "caf\xe9 au lait")
	s.putFile(t, "/tmp/plot.png", "\x89PNG\r\n\x1a\n...")
	s.putFile(t, "/tmp/huge.png", "\x89PNG\r\n\x1a\n"+strings.Repeat(".", 2<<20))
	for arguments, want := range map[string][]string{
		`"path":"/tmp/run.sh"`:                          {"echo é\n"},
		`"path":"/tmp/run.sh","offset":5,"length":null`: {"é\n"},
		`"path":"/tmp/run.sh","length":4`:               {"echo", "(4 of 8 bytes; to read on, call again with offset 4)"},
		`"path":"/tmp/run.sh","length":6`:               {"echo ", "(5 of 8 bytes; to read on, call again with offset 5)"},
		`"path":"/tmp/run.sh","offset":6`:               {"\n"},
		`"path":"/tmp/run.sh","offset":8`:               {"(no content at offset 8; the file has 8 bytes)"},
		`"path":"/tmp/empty"`:                           {"(no content at offset 0; the file has 0 bytes)"},
		`"path":"/tmp/long"`:                            {strings.Repeat("é", 25_000), "(50000 of 100000 bytes; to read on, call again with offset 50000)"},
		`"path":"/tmp/binary"`:                          {`"/tmp/binary" is not text but a binary file of 6 bytes; process it with code or a command in the sandbox`},
		`"path":"/tmp/latin"`:                           {`"/tmp/latin" is not text but a binary file of 12 bytes; process it with code or a command in the sandbox`},
		`"path":"/tmp/plot.png","length":4`:             {`"/tmp/plot.png" is not text but a binary file of 11 bytes; process it with code or a command in the sandbox`},
		`"path":"/tmp/plot.png"`:                        {"[image/png \x89PNG\r\n\x1a\n...]"},
		`"path":"/tmp/huge.png"`:                        {`"/tmp/huge.png" is an image of 2097160 bytes, and only images of up to 2097152 bytes can be shown; make it smaller with code in the sandbox`},
		`"path":"/tmp/none"`:                            {"/tmp/none does not exist in the sandbox"},
		`"path":"/tmp/long","length":200001`:            {"length must be an integer from 1 to 200000"},
	} {
		if got := call("sandbox_read_file", arguments); !slices.Equal(got, want) {
			t.Errorf("read %s: got %.300q, want %.300q", arguments, got, want)
		}
	}
	want := "/tmp/binary (6 bytes)\n/tmp/empty (0 bytes)\n/tmp/huge.png (2097160 bytes)\n/tmp/latin (12 bytes)\n/tmp/long (100000 bytes)\n/tmp/plot.png (11 bytes)\n/tmp/run.sh (8 bytes)"
	if got := call("sandbox_list_files", `"path":"/tmp"`); !slices.Equal(got, []string{want}) {
		t.Errorf("list: %q", got)
	}
	if got := call("sandbox_remove_file", `"path":"/tmp/run.sh"`); !slices.Equal(got, []string{"Done"}) {
		t.Errorf("remove: %q", got)
	}
	if got := call("sandbox_read_file", `"path":"/tmp/run.sh"`); !slices.Equal(got, []string{"/tmp/run.sh does not exist in the sandbox"}) {
		t.Errorf("read after remove: %q", got)
	}
	if got := call("sandbox_list_files", `"path":"/void"`); !slices.Equal(got, []string{"(the directory is empty)"}) {
		t.Errorf("list an empty directory: %q", got)
	}
}

// The names of files cannot forge lines of a list, and a list is limited.
func TestListFilesIsLimited(t *testing.T) {
	s := newSite(t)
	s.putFile(t, "/hostile/a\nb", "")
	for i := range 3000 {
		s.putFile(t, fmt.Sprintf("/many/%s%04d", strings.Repeat("x", 20), i), "")
	}
	if _, _, err := s.sandboxes.MakeDirectory(t.Context(), sandboxA, sandbox.Path{Path: "/hostile/dir"}, nil); err != nil {
		t.Fatal(err)
	}
	if got := contents(s.callTool(t, "sandbox_list_files", `{"sandbox":"a","path":"/hostile"}`))[0]; got != `/hostile/a\nb (0 bytes)`+"\n/hostile/dir/" {
		t.Errorf("%q", got)
	}
	got := contents(s.callTool(t, "sandbox_list_files", `{"sandbox":"a","path":"/many"}`))[0]
	lines := strings.Count(got, "\n")
	if len(got) > maxList+100 || !strings.HasSuffix(got, fmt.Sprintf("(%d more; list a directory below it)", 3000-lines)) {
		t.Errorf("%d bytes, %d lines, the end is %q", len(got), lines, got[len(got)-100:])
	}
}
