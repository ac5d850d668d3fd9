package hypervisor

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	// FailedDir is the name of the directory, among those of VMs or sandboxes, where KeepConsole puts consoles. No id
	// begins with a dot.
	FailedDir = ".failed"
	// failedKept is how many consoles it keeps.
	failedKept = 16
)

// KeepConsole moves the console's log of a VM that failed to FailedDir in dir, and removes the oldest ones there. It
// returns the new path, or "" if the guest said nothing or the log cannot be moved.
func KeepConsole(log, dir, id string) string {
	if info, err := os.Stat(log); err != nil || info.Size() == 0 {
		return ""
	}
	kept := filepath.Join(dir, FailedDir)
	to := filepath.Join(kept, id+".log")
	if os.MkdirAll(kept, 0o700) != nil || os.Rename(log, to) != nil {
		return ""
	}
	logs, _ := os.ReadDir(kept)
	slices.SortFunc(logs, func(a, b fs.DirEntry) int { return modTime(b).Compare(modTime(a)) })
	for _, old := range logs[min(len(logs), failedKept):] {
		_ = os.Remove(filepath.Join(kept, old.Name()))
	}
	return to
}

// modTime is when a file was last written; the zero time if it is gone.
func modTime(e fs.DirEntry) (t time.Time) {
	if info, err := e.Info(); err == nil {
		t = info.ModTime()
	}
	return t
}

// keepConsole keeps the console of a VM that failed.
func (s *Service) keepConsole(m *machine) string {
	return KeepConsole(filepath.Join(m.dir, consoleLog), s.cfg.Dir, m.ID)
}
