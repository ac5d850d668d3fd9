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
		t.Errorf("makeMountpoint for a dangling link = %q, %v; want the link's target", got, err)
	}
	if st, err := os.Stat(filepath.Join(dir, "below/target")); err != nil || !st.Mode().IsRegular() {
		t.Errorf("the link's target is %v, %v; want a regular file", st, err)
	}
	if _, err := makeMountpoint(filepath.Join(dir, "a/b"), true); err != nil {
		t.Error(err)
	}
	if _, err := makeMountpoint(filepath.Join(dir, "loop"), true); err == nil {
		t.Error("makeMountpoint for a loop of links returned no error")
	}
}
