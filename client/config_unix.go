//go:build unix

package client

import (
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

// untrustedReason says why another user may have written a file, and what to do. It returns "" if only this
// user, root and the file's group can write it. The group is trusted, because many systems give each user a group
// of their own and make files writable by it.
func untrustedReason(info fs.FileInfo, path string) string {
	if info.Mode().Perm()&0o002 != 0 {
		return fmt.Sprintf("everyone on this machine can write that file: if you wrote its contents, run 'chmod o-w %s'", path)
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Uid != 0 && int(stat.Uid) != os.Geteuid() {
		return fmt.Sprintf("that file belongs to another user (uid %d): if you wrote its contents, run 'chown %d %s'", stat.Uid, os.Geteuid(), path)
	}
	return ""
}
