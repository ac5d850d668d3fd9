package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// newFile is a file of this user alone that comes into being whole or not at all: it is written beside
// its place and moved there at the end.
type newFile struct {
	*os.File
	path string
}

// createFile fails where the file could not be put in its place later, so that it is called before what
// cannot be taken back.
func createFile(path string) (*newFile, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return nil, fmt.Errorf("write %s: %w", path, err)
	}
	return &newFile{f, path}, nil
}

// place puts the file in its place, over what may be there, and makes it durable.
func (f *newFile) place() error {
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

// discard ends the work on the file. What is not in its place by now is gone.
func (f *newFile) discard() {
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
