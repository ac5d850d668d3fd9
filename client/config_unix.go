//go:build unix

package client

import (
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// distrustOf says why a file's text may be another user's, and what to do; empty if it is not. Members of its
// group are trusted: many systems give each user one of his own, and let it write.
func distrustOf(info fs.FileInfo, path string) string {
	if info.Mode().Perm()&0o002 != 0 {
		return fmt.Sprintf("everyone on this machine can write that file: 'chmod o-w %s' if its text is yours", path)
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Uid != 0 && int(stat.Uid) != os.Geteuid() {
		return fmt.Sprintf("that file belongs to another user, with uid %d: 'chown %d %s' if its text is yours", stat.Uid, os.Geteuid(), path)
	}
	return ""
}
