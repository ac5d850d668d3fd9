//go:build unix

package client

import (
	"io/fs"
	"syscall"
)

// fileID identifies a file of this machine.
type fileID struct{ device, inode uint64 }

// idOf returns the id of a file, and whether it has several names.
func idOf(info fs.FileInfo) (id fileID, several bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return id, false
	}
	return fileID{uint64(st.Dev), uint64(st.Ino)}, st.Nlink > 1
}
