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
