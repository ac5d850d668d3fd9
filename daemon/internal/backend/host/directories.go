package host

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// CheckDirectories judges whether other users of this host could replace one of the server's directories, or a directory
// above it. Such a user could make the server read files that the user wrote, and write files elsewhere. The directories
// need not exist yet.
func CheckDirectories(dirs ...string) Check {
	const name = "directories"
	for _, dir := range dirs {
		if weak := replaceable(dir); weak != "" {
			return warning(name, "use --state-dir and --run-dir below directories that only root can write to, such as /var/lib and /run",
				"other users can replace %s: %s", dir, weak)
		}
	}
	return ok(name, "only this user can replace them")
}

// replaceable returns why another user could replace dir, or "" if none can. It follows symbolic links, because their
// targets and the directories with the links both matter.
func replaceable(dir string) string {
	for ; ; dir = filepath.Dir(dir) {
		if info, err := os.Lstat(dir); err == nil {
			owner := info.Sys().(*syscall.Stat_t)
			const others = 0o022
			switch {
			case owner.Uid != 0 && int(owner.Uid) != os.Geteuid():
				return fmt.Sprintf("%s belongs to user %d", dir, owner.Uid)
			case info.Mode()&os.ModeSymlink != 0: // every link has the mode 0777
			case info.Mode()&others != 0 && info.Mode()&os.ModeSticky == 0:
				return fmt.Sprintf("its group or all users can write to %s (%s)", dir, info.Mode())
			}
		}
		if target, err := filepath.EvalSymlinks(dir); err == nil && target != dir {
			if weak := replaceable(target); weak != "" {
				return weak
			}
		}
		if dir == filepath.Dir(dir) {
			return ""
		}
	}
}
