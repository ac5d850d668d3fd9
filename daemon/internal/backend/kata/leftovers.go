package kata

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
)

// vmRoot is where Kata's shim keeps the sockets of its QEMUs.
const vmRoot = "/run/vc/vm"

// kataDirs hold a directory of sockets and small files for each sandbox: that of its QEMU, and the shim's record of it.
// The runtime in Rust has one of its own.
var kataDirs = []string{vmRoot, "/run/vc/sbs", "/run/kata"}

// removeLeftovers removes what Kata left of a sandbox in the places that it uses on every host. The
// sandbox's processes have ended.
func removeLeftovers(ctx context.Context, id string) error {
	shared := filepath.Join(hypervisor.SharedRoot, id)
	if err := unmountBelow(shared); err != nil {
		return err
	}
	if err := removeHollow(shared); err != nil {
		return err
	}
	for _, dir := range kataDirs {
		if err := removeTree(filepath.Join(dir, id)); err != nil {
			return err
		}
	}
	return removeCgroups(ctx, id)
}

// cgroups finds the cgroups that Kata has for a sandbox, which are named for it: the one below the container's parent, and
// the one for processes outside of that. cgroup v1 has each of them once per controller.
func cgroups(id string) (found []string) {
	for _, root := range []string{"/sys/fs/cgroup/*/", "/sys/fs/cgroup/*/*/"} {
		for _, prefix := range []string{"kata_", ""} {
			paths, _ := filepath.Glob(root + prefix + id) // the patterns are good
			found = append(found, paths...)
		}
	}
	return found
}

// removeTree removes a directory and what is in it, but nothing of what is mounted there.
func removeTree(dir string) error {
	if err := unmountBelow(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

func removeCgroups(ctx context.Context, id string) error {
	for _, top := range cgroups(id) {
		var tree []string
		_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				tree = append(tree, path)
			}
			return nil
		})
		for _, cgroup := range slices.Backward(tree) { // children first
			var err error
			busy := func() bool { // for a moment after its last process has ended
				err = unix.Rmdir(cgroup)
				return errors.Is(err, unix.EBUSY)
			}
			if pollErr := poll(ctx, 10*time.Millisecond, func() bool { return !busy() }); pollErr != nil {
				err = pollErr
			}
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("remove the cgroup %s: %w", cgroup, err)
			}
		}
	}
	return nil
}

// unmountBelow detaches everything that is mounted at path or below, and makes sure of it.
func unmountBelow(path string) error {
	below := func(i *mountinfo.Info) (skip, stop bool) {
		return i.Mountpoint != path && !strings.HasPrefix(i.Mountpoint, path+"/"), false
	}
	mounts, err := mountinfo.GetMounts(below)
	if err != nil {
		return fmt.Errorf("find mounts below %s: %w", path, err)
	}
	for _, mount := range slices.Backward(mounts) { // the last one mounted lies on top
		err := unix.Unmount(mount.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: it went along with another
			return fmt.Errorf("unmount %s: %w", mount.Mountpoint, err)
		}
	}
	if mounts, err = mountinfo.GetMounts(below); err == nil && len(mounts) > 0 {
		err = fmt.Errorf("%s is still mounted", mounts[0].Mountpoint)
	}
	return err
}

// removeHollow removes directories and empty files, which is all that mount points are. A file
// with content is somebody's: it stays, and is an error. containerd may clean up at the same time.
func removeHollow(path string) error {
	entries, err := os.ReadDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := filepath.Join(path, e.Name())
		if e.IsDir() {
			err = removeHollow(name)
		} else {
			err = removeEmptyFile(name)
		}
		if err != nil {
			return err
		}
	}
	return removeIfThere(path)
}

func removeEmptyFile(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && (!info.Mode().IsRegular() || info.Size() > 0) {
		err = fmt.Errorf("remove %s: it is no mount point", path)
	}
	if err != nil {
		return err
	}
	return removeIfThere(path)
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
