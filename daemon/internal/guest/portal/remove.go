package portal

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

const (
	// removeBatch is how many names of a directory a remover reads at a time.
	removeBatch = 32
	// removeDepth is how many directories in each other a remover keeps open, if it can move deeper ones.
	removeDepth = 64
	// perRemoved is what a directory that is being removed needs in memory, in bytes.
	perRemoved = 16 << 10
)

// removeTree removes the file or directory at path with everything in it. It follows no symbolic link, except in the
// directories above. It succeeds if there is no such file. If ctx ends, it returns the error of ctx, and a part of the tree
// is removed. budget limits the memory that it needs. Other errors are gRPC statuses or those of the kernel.
func removeTree(ctx context.Context, budget *limit.Budget, path string) error {
	parent, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer parent.Close()
	r := remover{ctx: ctx, memory: &memory{budget: budget}}
	defer r.memory.close()
	return r.remove(parent, filepath.Base(path), 0)
}

// remover removes a tree.
type remover struct {
	ctx    context.Context
	memory *memory
	root   *os.File // the directory that is the root of the tree
}

// remove removes the file or directory name in dir, which depth directories of the tree contain. It may move a directory
// up to the root of the tree instead.
func (r *remover) remove(dir *os.File, name string, depth int) error {
	if err := r.ctx.Err(); err != nil {
		return err
	}
	err := unix.Unlinkat(int(dir.Fd()), name, 0)
	switch err {
	case nil, unix.ENOENT:
		return nil
	case unix.EISDIR, unix.EPERM, unix.EACCES: // it may be a directory
	default:
		return err
	}
	if depth >= removeDepth && r.moveUp(dir, name) {
		return nil
	}
	sub, openErr := openAt(dir, name, unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if errors.Is(openErr, unix.ENOTDIR) {
		return err
	}
	if openErr == nil {
		defer sub.Close()
		if depth == 0 {
			r.root = sub
		}
		openErr = r.empty(sub, depth+1)
	}
	// A directory that cannot be read may be empty.
	switch err := unix.Unlinkat(int(dir.Fd()), name, unix.AT_REMOVEDIR); err {
	case nil, unix.ENOENT:
		return nil
	default:
		return cmp.Or(openErr, error(err))
	}
}

// empty removes what is in dir, which is at this depth. It goes on after an error, and returns the first.
func (r *remover) empty(dir *os.File, depth int) error {
	if err := r.memory.hold(perRemoved); err != nil {
		return err
	}
	defer r.memory.release(perRemoved)
	// A file system may leave out names while files are removed. So read them again until there are none.
	for {
		var first error
		removed := false
		for {
			names, err := dir.Readdirnames(removeBatch)
			if err == io.EOF {
				break
			}
			if err != nil {
				return err
			}
			for _, name := range names {
				err := r.remove(dir, name, depth)
				if r.ctx.Err() != nil {
					return r.ctx.Err()
				}
				first = cmp.Or(first, err)
				removed = removed || err == nil
			}
		}
		if !removed {
			return first
		}
		if _, err := dir.Seek(0, io.SeekStart); err != nil {
			return err
		}
	}
}

// moveUp moves the directory name in dir to the root of the tree, so that it is removed from there. Otherwise, a deep tree
// would need an open directory for each level. It returns false if the file system does not permit that.
func (r *remover) moveUp(dir *os.File, name string) bool {
	to := ".msb-" + rand.Text()
	return unix.Renameat2(int(dir.Fd()), name, int(r.root.Fd()), to, unix.RENAME_NOREPLACE) == nil
}
