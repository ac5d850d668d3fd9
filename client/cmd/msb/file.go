package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// atomicFile is a file that only this user can read and that appears complete or not at all: it is written to a temporary
// file in the same directory and renamed by commit.
type atomicFile struct {
	*os.File
	path string
}

// createFile creates the temporary file for path. Call it before any step that cannot be undone, because it fails if the
// directory cannot be written.
func createFile(path string) (*atomicFile, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		err = e.Err // without the name of the temporary file
	}
	if err != nil {
		return nil, fmt.Errorf("write %s: %w", path, err)
	}
	return &atomicFile{f, path}, nil
}

// commit moves the file to its path, replacing any file there, and syncs it to disk.
func (f *atomicFile) commit() error {
	err := f.Sync()
	if err == nil {
		err = os.Rename(f.Name(), f.path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(f.path))
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", f.path, err)
	}
	return nil
}

// discard closes the file and removes it unless it was committed.
func (f *atomicFile) discard() {
	_ = f.Close()
	_ = os.Remove(f.Name())
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
