package storage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

// copyRoot is the directory below which the host may create files.
const copyRoot = "/run/kata-containers"

// CopyFile creates a file, a directory or a symbolic link in the guest. A large file arrives in several requests. It
// appears under its name after the last one. CopyFile follows no link that leads out of copyRoot, because the shim
// copies into directories that containers can write to. It returns errdefs.ErrInvalidArgument if req is not valid.
func CopyFile(req *pb.CopyFileRequest) error {
	path, ok := strings.CutPrefix(req.Path, copyRoot+"/")
	if !ok || filepath.Clean(req.Path) != req.Path || strings.ContainsRune(path, 0) {
		return refusal.Invalid("path %q is not below %s", req.Path, copyRoot)
	}
	end := req.Offset + int64(len(req.Data))
	if req.Offset < 0 || req.FileSize < 0 || end < req.Offset {
		return refusal.Invalid("invalid range: bytes %d to %d of %d", req.Offset, end, req.FileSize)
	}
	kind := req.FileMode & unix.S_IFMT
	if kind == unix.S_IFREG && end > req.FileSize {
		return refusal.Invalid("invalid range: bytes %d to %d of %d", req.Offset, end, req.FileSize)
	}
	if err := os.MkdirAll(copyRoot, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(copyRoot)
	if err != nil {
		return err
	}
	defer root.Close()
	dirMode := os.FileMode(req.DirMode & 0o777)
	if dirMode == 0 {
		dirMode = 0o750
	}
	if err := root.MkdirAll(filepath.Dir(path), dirMode); err != nil {
		return err
	}
	switch kind {
	case unix.S_IFDIR:
		return copyDir(root, path, req)
	case unix.S_IFLNK:
		return copyLink(root, path, req)
	case unix.S_IFREG:
		return copyPart(root, path, req)
	default:
		return fmt.Errorf("unsupported file mode %#o: %w", req.FileMode, errdefs.ErrInvalidArgument)
	}
}

// copyDir creates the directory path, or sets the owner and mode of an existing one. If path is a file, it replaces the
// file.
func copyDir(root *os.Root, path string, req *pb.CopyFileRequest) error {
	if st, err := root.Lstat(path); err == nil && !st.IsDir() {
		if err := root.Remove(path); err != nil {
			return err
		}
	}
	if err := root.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return setOwner(root, path, req)
}

// copyLink creates the symbolic link path. If path is a file, it replaces the file.
func copyLink(root *os.Root, path string, req *pb.CopyFileRequest) error {
	if err := root.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := root.Symlink(string(req.Data), path); err != nil {
		return err
	}
	return root.Lchown(path, int(req.Uid), int(req.Gid))
}

// copyPart writes a part of a file to a temporary file, and renames that file after the last part.
func copyPart(root *os.Root, path string, req *pb.CopyFileRequest) error {
	part := path + ".part"
	flags := os.O_WRONLY
	if req.Offset == 0 {
		flags |= os.O_CREATE | os.O_EXCL
		if err := root.Remove(part); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	f, err := root.OpenFile(part, flags, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(req.Data, req.Offset)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if req.Offset+int64(len(req.Data)) < req.FileSize {
		return nil
	}
	if err := setOwner(root, part, req); err != nil {
		return err
	}
	return root.Rename(part, path)
}

// setOwner sets the owner and mode of the file or directory path as req says.
func setOwner(root *os.Root, path string, req *pb.CopyFileRequest) error {
	if err := root.Lchown(path, int(req.Uid), int(req.Gid)); err != nil {
		return err
	}
	return root.Chmod(path, goMode(req.FileMode))
}

// goMode translates mode, as in chmod(2), to an os.FileMode.
func goMode(mode uint32) os.FileMode {
	m := os.FileMode(mode & 0o777)
	for bit, goBit := range map[uint32]os.FileMode{
		unix.S_ISUID: os.ModeSetuid, unix.S_ISGID: os.ModeSetgid, unix.S_ISVTX: os.ModeSticky,
	} {
		if mode&bit != 0 {
			m |= goBit
		}
	}
	return m
}
