package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/msbd/msbd/client/internal/dotenv"
)

// maxEnvFile is the largest file that is changed, in bytes. It is larger than any file of environment variables.
const maxEnvFile = 1 << 20

// envFile is a new version of a file of environment variables, which has lines NAME=value. set sets a variable in it and
// replaces the old version. The owner stays the same; if there is no old version and root creates the file, it gets the
// owner of its directory. The mode is 0600.
type envFile struct {
	*atomicFile
	owner owner // the temporary file already belongs to it
}

// prepareEnvFile prepares to replace the file at path. It fails if set could not write the file later, so call it before a
// key is created.
func prepareEnvFile(path string) (*envFile, error) {
	temp, err := createFile(path)
	if err != nil {
		return nil, err
	}
	f := &envFile{atomicFile: temp}
	if _, f.owner, err = f.read(); err == nil {
		if err = f.owner.give(f.File); err != nil {
			err = fmt.Errorf("set the owner of %s: %w", path, err)
		}
	}
	if err != nil {
		f.discard()
		return nil, err
	}
	return f, nil
}

// set sets a variable and leaves all other lines as they are.
func (f *envFile) set(name, value string) error {
	content, owner, err := f.read()
	if err != nil {
		return err
	}
	if owner != f.owner {
		return f.changed()
	}
	if _, err := f.Write(dotenv.Set(content, name, value)); err != nil {
		return f.explain(err)
	}
	return f.commit()
}

func (f *envFile) changed() error {
	return fmt.Errorf("%s was replaced by somebody else in the meantime; try again", f.path)
}

// read returns the content of the old version, or nil if there is none, and the owner of the new version. Both are of the
// same file: nobody may get the content of another user's file.
func (f *envFile) read() ([]byte, owner, error) {
	found, err := f.old()
	if errors.Is(err, fs.ErrNotExist) {
		info, err := f.Stat()
		if err == nil && os.Geteuid() == 0 {
			info, err = f.dir.Lstat(".") // when root writes in a user's directory, the file must belong to the user
		}
		if err != nil {
			return nil, owner{}, f.explain(err)
		}
		return nil, ownerOf(info), nil
	}
	if err != nil {
		return nil, owner{}, err
	}
	file, err := f.dir.OpenFile(f.name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would block
	if err != nil {
		return nil, owner{}, f.explain(err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err == nil && !os.SameFile(info, found) {
		return nil, owner{}, f.changed()
	}
	var content []byte
	if err == nil {
		content, err = io.ReadAll(io.LimitReader(file, maxEnvFile+1))
	}
	if err != nil {
		return nil, owner{}, f.explain(err)
	}
	if len(content) > maxEnvFile {
		return nil, owner{}, fmt.Errorf("%s is larger than %s and cannot be a file of environment variables", f.path, size(maxEnvFile))
	}
	return content, ownerOf(info), nil
}
