// Package durable changes files and directories so that the change survives a power loss. A rename or a
// new file is on the disk only once its directory was synced, and the content of a file only once the
// file was: a caller that skips either finds the old state, an empty file or no file after a crash.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// TempSuffix is what WriteFile appends to a path to name its temporary file. A crash may leave that file
// behind, with content as secret as that of the file itself: the next WriteFile removes it.
const TempSuffix = ".new"

// ErrNotDurable says that a file was replaced, but that a power loss may still bring the old one back.
var ErrNotDurable = errors.New("replaced, but it may not survive a power loss")

// SyncDir makes the names in a directory durable: files that were created, renamed or removed in it stay
// so after a power loss. It does not sync the content of the files.
func SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// WriteFile creates the file at path with data and perm, or replaces it. After a crash at any point the
// file has either its old content or all of data; once WriteFile has returned nil, it has data, also
// after a power loss. After an error the old file is in place, unless the error is ErrNotDurable. Two
// writers of one path must take turns.
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
			_ = os.Remove(temp) // gone already if it was renamed
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

// MkdirAll creates a directory and its missing parents with perm, like os.MkdirAll. What it created
// survives a power loss. A directory that exists stays as it is, and is not synced.
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
