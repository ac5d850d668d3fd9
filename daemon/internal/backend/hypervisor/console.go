package hypervisor

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	// FailedDir is the name of the directory where KeepConsole stores console logs. It is next to the directories of
	// VMs or sandboxes, whose ids never begin with a dot.
	FailedDir = ".failed"
	// maxConsoles is how many console logs KeepConsole keeps.
	maxConsoles = 16
)

// KeepConsole moves log, the console log of the failed VM id, to FailedDir in dir, and removes the oldest logs there.
// It returns the new path, or "" if the log is empty or cannot be moved.
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
	for _, old := range logs[min(len(logs), maxConsoles):] {
		_ = os.Remove(filepath.Join(kept, old.Name()))
	}
	return to
}

// modTime returns when the file e was last modified, or the zero time if it does not exist any more.
func modTime(e fs.DirEntry) (t time.Time) {
	if info, err := e.Info(); err == nil {
		t = info.ModTime()
	}
	return t
}

// keepConsole keeps the console log of a failed VM. It is like KeepConsole.
func (s *Service) keepConsole(m *machine) string {
	return KeepConsole(filepath.Join(m.dir, consoleLog), s.cfg.Dir, m.ID)
}
