//go:build unix

package main

import (
	"errors"
	"io/fs"
	"os"
	"syscall"
)

// owner is a user and a group.
type owner struct{ uid, gid int }

// ownerOf returns the owner of a file.
func ownerOf(info fs.FileInfo) owner {
	stat := info.Sys().(*syscall.Stat_t)
	return owner{int(stat.Uid), int(stat.Gid)}
}

// give makes o the owner of f, unless f belongs to this user and o is this user. Only root can give a file away.
func (o owner) give(f *os.File) error {
	if o.uid == os.Geteuid() {
		return nil
	}
	return f.Chown(o.uid, o.gid)
}

// syncDir makes the names in a directory durable.
func syncDir(dir *os.Root) error {
	f, err := dir.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
