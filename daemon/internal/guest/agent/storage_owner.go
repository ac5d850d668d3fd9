package agent

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
)

// owner is what a storage's directory should become.
type owner struct {
	gid  int // -1 leaves it
	mode os.FileMode
}

// splitStorageOptions takes the options out that are for the agent, not for a file system.
func splitStorageOptions(options []string) ([]string, owner) {
	o := owner{gid: -1}
	var rest []string
	for _, opt := range options {
		value, ok := strings.CutPrefix(opt, "fsgid=")
		if gid, err := strconv.ParseUint(value, 10, 31); ok && err == nil {
			o.gid = int(gid)
			continue
		}
		rest = append(rest, opt)
	}
	return rest, o
}

// withMode takes the mode from a directory's options; a file system reads its own.
func (o owner) withMode(options []string) owner {
	for _, opt := range options {
		value, ok := strings.CutPrefix(opt, "mode=")
		if mode, err := strconv.ParseUint(value, 8, 12); ok && err == nil {
			o.mode = os.FileMode(mode & 0o777)
			if mode&0o1000 != 0 {
				o.mode |= os.ModeSticky
			}
		}
	}
	return o
}

func (o owner) apply(path string) error {
	mode := o.mode
	if o.gid >= 0 {
		if err := os.Chown(path, -1, o.gid); err != nil {
			return err
		}
		if mode == 0 {
			st, err := os.Stat(path)
			if err != nil {
				return err
			}
			mode = st.Mode()
		}
		// Files made in it belong to the group too, and its members may make some.
		mode |= os.ModeSetgid | 0o070
	}
	if mode == 0 {
		return nil
	}
	return os.Chmod(path, mode)
}

// setGroup gives a volume to the group that its pod asks for, all of its files included.
func setGroup(ctx context.Context, point string, st *pb.Storage) error {
	group := st.GetFsGroup()
	if group == nil || slices.Contains(st.Options, "ro") {
		return nil // what is read-only keeps its owners
	}
	gid := int(group.GroupId)
	// A root has no way out for the links that a volume may hold.
	root, err := os.OpenRoot(point)
	if err != nil {
		return err
	}
	defer root.Close()
	if group.GroupChangePolicy == protocols.FSGroupChangePolicy_OnRootMismatch {
		st, err := root.Lstat(".")
		if err != nil {
			return err
		}
		if fileGroup(st) == gid && st.Mode()&(os.ModeSetgid|groupDir) == os.ModeSetgid|groupDir {
			return nil
		}
	}
	err = fs.WalkDir(root.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		if err := root.Lchown(path, -1, gid); err != nil {
			return err
		}
		if d.Type()&os.ModeSymlink != 0 {
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		mode := info.Mode() | groupFile
		if d.IsDir() {
			mode |= os.ModeSetgid | groupDir
		}
		return root.Chmod(path, mode)
	})
	if err != nil {
		return fmt.Errorf("give it to group %d: %w", gid, err)
	}
	return nil
}

func fileGroup(st os.FileInfo) int { return int(st.Sys().(*syscall.Stat_t).Gid) }

// What a group may do with its volume's files and directories.
const (
	groupFile os.FileMode = 0o660
	groupDir  os.FileMode = 0o770
)
