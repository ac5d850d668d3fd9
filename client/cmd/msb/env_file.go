package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/client/internal/dotenv"
)

// maxEnvFile is the largest file that is changed, in bytes. It is larger than any file of environment variables.
const maxEnvFile = 1 << 20

// envFile is a new version of a file of environment variables, which has lines NAME=value. set sets a variable in it and
// replaces the old version. The owner stays the same; if there is no old version and root creates the file, it gets the
// owner of its directory. The mode is 0600.
type envFile struct{ *atomicFile }

// prepareEnvFile prepares to replace the file at path. It fails if set could not write the file later, so call it before a
// key is created.
func prepareEnvFile(path string) (*envFile, error) {
	// A symbolic link is not followed, because anyone who may write in the directory could have created it.
	info, err := os.Lstat(path)
	exists := err == nil
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	case exists && info.Mode().Type() == fs.ModeSymlink:
		return nil, fmt.Errorf("%s is a symbolic link: use the path of the file that it points to", path)
	case exists && !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	if _, err := readEnvFile(path); err != nil {
		return nil, err
	}
	f, err := createFile(path)
	if err != nil {
		return nil, err
	}
	// When root writes in a user's directory, the file must belong to the user.
	if !exists && os.Geteuid() == 0 {
		if info, err = os.Stat(filepath.Dir(path)); err != nil {
			f.discard()
			return nil, err
		}
	}
	if info != nil {
		if owner := ownerOf(info); int(owner.Uid) != os.Geteuid() {
			if err := f.Chown(int(owner.Uid), int(owner.Gid)); err != nil {
				f.discard()
				return nil, fmt.Errorf("set the owner of %s: %w", path, err)
			}
		}
	}
	return &envFile{f}, nil
}

// set sets a variable and leaves all other lines as they are.
func (f *envFile) set(name, value string) error {
	content, err := readEnvFile(f.path)
	if err != nil {
		return err
	}
	if _, err := f.Write(dotenv.Set(content, name, value)); err != nil {
		return fmt.Errorf("write %s: %w", f.path, err)
	}
	return f.commit()
}

// readEnvFile returns the content of a file, or nil if the file does not exist.
func readEnvFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxEnvFile+1))
	if err != nil {
		return nil, err
	}
	if len(content) > maxEnvFile {
		return nil, fmt.Errorf("%s is larger than %s and cannot be a file of environment variables", path, size(maxEnvFile))
	}
	return content, nil
}

func ownerOf(info fs.FileInfo) *syscall.Stat_t { return info.Sys().(*syscall.Stat_t) }
