package container

import (
	"os"
	"path/filepath"
	"testing"
)

func TestMakeMountpoint(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("below/target", filepath.Join(dir, "dangling")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("loop", filepath.Join(dir, "loop")); err != nil {
		t.Fatal(err)
	}
	got, err := makeMountpoint(filepath.Join(dir, "dangling"), false)
	if err != nil || got != filepath.Join(dir, "below/target") {
		t.Errorf("got %q, %v", got, err)
	}
	if st, err := os.Stat(filepath.Join(dir, "below/target")); err != nil || !st.Mode().IsRegular() {
		t.Errorf("target: %v, %v", st, err)
	}
	if _, err := makeMountpoint(filepath.Join(dir, "a/b"), true); err != nil {
		t.Error(err)
	}
	if _, err := makeMountpoint(filepath.Join(dir, "loop"), true); err == nil {
		t.Error("a loop of links was taken")
	}
}
