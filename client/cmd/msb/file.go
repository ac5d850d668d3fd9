package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// atomicFile is a file that only this user can read and that appears complete or not at all: it is written to a temporary
// file in the same directory and renamed by commit. The directory is opened once, and every step is relative to it, so
// that a user who can replace the directory cannot have a step done in another one.
type atomicFile struct {
	*os.File
	dir  *os.Root
	name string // in dir
	temp string // the temporary file's name in dir
	path string // as the user gave it, for messages
}

// createFile creates the temporary file for path. Call it before any step that cannot be undone, because it fails if the
// directory cannot be written. The caller must call discard in the end.
func createFile(path string) (*atomicFile, error) {
	parent, name := filepath.Split(path)
	if name == "" || name == "." || name == ".." {
		return nil, fmt.Errorf("%s is a directory: give the path of a file", path)
	}
	if parent == "" {
		parent = "."
	}
	dir, err := os.OpenRoot(parent)
	if err != nil {
		return nil, fileError("write", path, err)
	}
	f := &atomicFile{dir: dir, name: name, temp: "." + name + "." + rand.Text(), path: path}
	f.File, err = dir.OpenFile(f.temp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		_ = dir.Close()
		return nil, f.explain(err)
	}
	return f, nil
}

// explain names the file that the user gave in an error, instead of the temporary one.
func (f *atomicFile) explain(err error) error { return fileError("write", f.path, err) }

// fileError returns the error for a failed attempt to read or write the file at path. It leaves out the system call and the
// path in err, which may be that of another file.
func fileError(action, path string, err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		err = e.Err
	} else if e, ok := errors.AsType[*os.LinkError](err); ok {
		err = e.Err
	}
	return fmt.Errorf("could not %s %s: %w", action, path, err)
}

// old returns information about the file that commit replaces. It returns fs.ErrNotExist if there is none, and an error if
// it is not a regular file. A symbolic link is not followed, because anyone who may write in the directory could have
// created it.
func (f *atomicFile) old() (fs.FileInfo, error) {
	info, err := f.dir.Lstat(f.name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fs.ErrNotExist
	case err != nil:
		return nil, f.explain(err)
	case info.Mode().Type() == fs.ModeSymlink:
		return nil, fmt.Errorf("%s is a symbolic link: use the path of the file that it points to", f.path)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", f.path)
	}
	return info, nil
}

// commit moves the file to its path, replacing any file there, and syncs it to disk.
func (f *atomicFile) commit() error {
	err := f.Sync()
	if err == nil {
		err = f.dir.Rename(f.temp, f.name)
	}
	if err == nil {
		err = syncDir(f.dir)
	}
	if err != nil {
		return f.explain(err)
	}
	return nil
}

// discard closes the file and removes it unless it was committed.
func (f *atomicFile) discard() {
	_ = f.Close()
	_ = f.dir.Remove(f.temp)
	_ = f.dir.Close()
}
