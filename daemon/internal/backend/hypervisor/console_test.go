package hypervisor

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

func TestKeepConsoleRemovesOldest(t *testing.T) {
	dir := t.TempDir()
	console := filepath.Join(dir, "vm", consoleLog)
	began := time.Now().Add(-time.Hour)
	for i := range maxConsoles + 3 {
		writeFile(t, console, "x")
		if err := os.Chtimes(console, began, began.Add(time.Duration(i)*time.Second)); err != nil {
			t.Fatal(err)
		}
		if kept := KeepConsole(console, dir, strconv.Itoa(i)); kept == "" || missing(kept) || !missing(console) {
			t.Fatalf("%q does not exist, or %s still exists", kept, console)
		}
	}
	if logs, err := os.ReadDir(filepath.Join(dir, FailedDir)); err != nil || len(logs) != maxConsoles {
		t.Errorf("kept %d console logs, want %d; %v", len(logs), maxConsoles, err)
	}
	if oldest := filepath.Join(dir, FailedDir, "2.log"); !missing(oldest) {
		t.Errorf("%s was not removed", oldest)
	}
	writeFile(t, console, "")
	if kept := KeepConsole(console, dir, "silent"); kept != "" {
		t.Errorf("kept an empty console log as %q", kept)
	}
}
