package main

import (
	"os"
	"path/filepath"
	"testing"
)

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

func TestEnvFileKeepsItsOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("only root can give a file to another user")
		return
	}
	for _, exists := range []bool{true, false} { // a new file gets the owner of its directory
		path := filepath.Join(t.TempDir(), ".env")
		owned := filepath.Dir(path)
		if exists {
			owned = path
			if err := os.WriteFile(path, nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chown(owned, 1234, 5678); err != nil {
			t.Fatal(err)
		}
		f, err := prepareEnvFile(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.discard()
		if err := f.set("K", "v"); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if owner := ownerOf(info); owner.Uid != 1234 || owner.Gid != 5678 || info.Mode().Perm() != 0o600 {
			t.Errorf("existing file: %t; got owner %d:%d and mode %s", exists, owner.Uid, owner.Gid, info.Mode())
		}
	}
}
