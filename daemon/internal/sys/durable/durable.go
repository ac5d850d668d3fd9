// Package durable changes files and directories so that the changes survive a power loss. A new file or a rename is on
// the disk only after a sync of the directory, and the content of a file only after a sync of the file. A program that
// omits one of them may find the old file, an empty file or no file after a crash.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// TempSuffix is the suffix that WriteFile appends to a path to name its temporary file. A crash may leave that file,
// which is as secret as the file itself. The next WriteFile for the path removes it.
const TempSuffix = ".new"

// ErrNotDurable means that a file was replaced, but that a power loss may still bring the old one back.
var ErrNotDurable = errors.New("replaced, but it may not survive a power loss")

// SyncDir makes the creation, renaming and removal of files in dir durable. It does not sync the content of the
// files.
func SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// WriteFile creates the file at path with data and perm, or replaces it atomically. After a crash at any point, the file
// has either its old content or all of data. Once WriteFile has returned nil, the file has data even after a power loss.
// After an error, the old file is unchanged, unless the error is ErrNotDurable. WriteFile must not be called concurrently
// for one path.
func WriteFile(path string, data []byte, perm fs.FileMode) (err error) {
	temp := path + TempSuffix
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(temp) // does nothing if the file was already renamed
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err = os.Rename(temp, path); err != nil {
		return err
	}
	if err := SyncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("%w: %w", ErrNotDurable, err)
	}
	return nil
}

// MkdirAll is like os.MkdirAll, but the directories that it creates survive a power loss. It does not change a
// directory that already exists. It syncs the parent of each directory that it creates.
func MkdirAll(dir string, perm fs.FileMode) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(dir)
	if err := MkdirAll(parent, perm); err != nil {
		return err
	}
	if err := os.Mkdir(dir, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return SyncDir(parent)
}
