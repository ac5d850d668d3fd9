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

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
)

// vmRoot is the directory where Kata's shim keeps the sockets of its QEMU processes.
const vmRoot = "/run/vc/vm"

// kataDirs are directories in which Kata creates a directory for each sandbox. The first is for QEMU's sockets, the
// second for the shim's record of the sandbox, and the third for the sockets and files of the Rust runtime.
var kataDirs = []string{vmRoot, "/run/vc/sbs", "/run/kata"}

// removeLeftovers removes Kata's mounts, files and cgroups for sandbox id. The sandbox's processes must have ended.
func removeLeftovers(ctx context.Context, id string) error {
	shared := filepath.Join(hypervisor.SharedRoot, id)
	if err := unmountBelow(shared); err != nil {
		return err
	}
	if err := removeMountPoints(shared); err != nil {
		return err
	}
	for _, dir := range kataDirs {
		if err := removeTree(filepath.Join(dir, id)); err != nil {
			return err
		}
	}
	return removeCgroups(ctx, id)
}

// cgroups returns the cgroups that Kata has created for sandbox id. Their names contain the id. One is below the
// container's parent cgroup, and one is for processes outside of that. With cgroup v1, each of them exists once per
// controller.
func cgroups(id string) (found []string) {
	for _, root := range []string{"/sys/fs/cgroup/*/", "/sys/fs/cgroup/*/*/"} {
		for _, prefix := range []string{"kata_", ""} {
			paths, _ := filepath.Glob(root + prefix + id) // these patterns are never malformed
			found = append(found, paths...)
		}
	}
	return found
}

// removeTree removes dir and its content. It first unmounts everything below dir, so it never removes files in mounts.
func removeTree(dir string) error {
	if err := unmountBelow(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// removeCgroups removes the cgroups of sandbox id. The sandbox's processes must have ended.
func removeCgroups(ctx context.Context, id string) error {
	for _, top := range cgroups(id) {
		if err := hypervisor.RemoveCgroup(ctx, top); err != nil {
			return err
		}
	}
	return nil
}

// unmountBelow detaches everything that is mounted at path or below it. It returns an error if a mount remains.
func unmountBelow(path string) error {
	below := func(i *mountinfo.Info) (skip, stop bool) {
		return i.Mountpoint != path && !strings.HasPrefix(i.Mountpoint, path+"/"), false
	}
	mounts, err := mountinfo.GetMounts(below)
	if err != nil {
		return fmt.Errorf("find mounts below %s: %w", path, err)
	}
	for _, mount := range slices.Backward(mounts) { // the last mount is on top
		err := unix.Unmount(mount.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL if it was detached together with another mount
			return fmt.Errorf("unmount %s: %w", mount.Mountpoint, err)
		}
	}
	if mounts, err = mountinfo.GetMounts(below); err == nil && len(mounts) > 0 {
		err = fmt.Errorf("%s is still mounted", mounts[0].Mountpoint)
	}
	return err
}

// removeMountPoints removes path and everything below it. Mount points are directories and empty files.
// removeMountPoints returns an error for any other file instead of removing it, because that may be somebody's data.
// containerd may remove files at the same time.
func removeMountPoints(path string) error {
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
			err = removeMountPoints(name)
		} else {
			err = removeEmptyFile(name)
		}
		if err != nil {
			return err
		}
	}
	return removeIfExists(path)
}

func removeEmptyFile(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && (!info.Mode().IsRegular() || info.Size() > 0) {
		err = fmt.Errorf("remove %s: it is not an empty file", path)
	}
	if err != nil {
		return err
	}
	return removeIfExists(path)
}

func removeIfExists(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
