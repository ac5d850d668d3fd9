package kata

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// A connection to a sandbox that was just removed does not create its directory again, which would stay.
func TestAttachCreatesNoDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "sb-1")
	if fifos, err := newFIFOs(dir, "portal-1"); !errors.Is(err, os.ErrNotExist) || !missing(dir) {
		t.Errorf("without a directory: %v, %v", fifos, err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	fifos, err := newFIFOs(dir, "portal-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := fifos.Close(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); len(left) != 0 || err != nil {
		t.Errorf("left in the directory: %v, %v", left, err)
	}
}
