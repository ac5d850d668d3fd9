package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestSetVariable(t *testing.T) {
	for name, tt := range map[string]struct{ before, after string }{
		"empty":                 {"", "K=v\n"},
		"added":                 {"A=1\n", "A=1\nK=v\n"},
		"added without newline": {"A=1", "A=1\nK=v\n"},
		"added with CRLF":       {"A=1\r\nB=2", "A=1\r\nB=2\r\nK=v\r\n"},
		"replaced":              {"A=1\nK=old\nB=2\n", "A=1\nK=v\nB=2\n"},
		"no newline":            {"A=1\nK=old", "A=1\nK=v"},
		"CRLF":                  {"A=1\r\nK=old\r\nB=2\r\n", "A=1\r\nK=v\r\nB=2\r\n"},
		"mixed endings":         {"A=1\nK=old\r\nB=2\n", "A=1\nK=v\r\nB=2\n"},
		"export":                {"export K=\"old\"\n", "export K=v\n"},
		"indented, with spaces": {"\t export  K = 'old' # why\n", "\t export  K=v\n"},
		"every one":             {"K=a\nA=1\nexport K=b\nK=\n", "K=v\nA=1\nexport K=v\nK=v\n"},
		"comments":              {"# K=old\n#K=old\n", "# K=old\n#K=old\nK=v\n"},
		"other names":           {"K_FILE=a\nXK=b\nK2=c\nk=d\nexportK=e\n", "K_FILE=a\nXK=b\nK2=c\nk=d\nexportK=e\nK=v\n"},
		"not text":              {"\x00\xff\n\n\r\nA", "\x00\xff\n\n\r\nA\nK=v\n"},
		"empty lines":           {"\n\n", "\n\nK=v\n"},
		"no assignment":         {"K\nexport K\n", "K\nexport K\nK=v\n"},
	} {
		got := setVariable([]byte(tt.before), "K", "v")
		if string(got) != tt.after {
			t.Errorf("%s: %q became %q, want %q", name, tt.before, got, tt.after)
		}
		if again := setVariable(got, "K", "v"); !bytes.Equal(again, got) {
			t.Errorf("%s: set again, it became %q", name, again)
		}
	}
}

// set reads the file again, so that a change made since prepareEnvFile is not lost.
func TestEnvFileIsReadAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), ".env")
	f, err := prepareEnvFile(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.discard()
	if _, err := os.Stat(path); err == nil {
		t.Error("the file exists before set")
	}
	if err := os.WriteFile(path, []byte("A=1\n"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := f.set("K", "v"); err != nil {
		t.Fatal(err)
	}
	f.discard()
	content, err := os.ReadFile(path)
	if err != nil || string(content) != "A=1\nK=v\n" {
		t.Errorf("got %q, %v", content, err)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("files in the directory: %v, %v", entries, err)
	}
}

func FuzzSetVariable(f *testing.F) {
	for _, seed := range []string{"", "K=a", "A=1\r\nexport K=b\r\n", "K=\n\nK = x", "\r\r\nK=", "# K=\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, before []byte) {
		after := setVariable(before, "K", "v")
		old, now := bytes.Split(before, []byte("\n")), bytes.Split(after, []byte("\n"))
		set := false
		for i, line := range now {
			if bytes.HasSuffix(bytes.TrimRight(line, "\r"), []byte("K=v")) {
				set = true
			} else if i < len(old) && !bytes.Equal(line, old[i]) && !(i == len(old)-1 && bytes.Equal(line, append(bytes.Clone(old[i]), '\r'))) {
				t.Fatalf("%q became %q: line %d was changed", before, after, i)
			}
		}
		if !set || !bytes.Equal(setVariable(after, "K", "v"), after) {
			t.Fatalf("%q became %q", before, after)
		}
	})
}
