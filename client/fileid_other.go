//go:build !unix

package client

import "io/fs"

// fileID identifies a file of this machine.
type fileID struct{}

// idOf returns false: this system does not tell whether a file has several names.
func idOf(fs.FileInfo) (id fileID, several bool) { return id, false }
