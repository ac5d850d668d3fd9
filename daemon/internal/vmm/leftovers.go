package vmm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// removeLeftovers removes what a shim that did not end by itself left for a sandbox in the places
// that Kata uses on every host.
func removeLeftovers(id string) error {
	shared := filepath.Join(sharedRoot, id)
	if err := unmountBelow(shared); err != nil {
		return err
	}
	if err := removeHollow(shared); err != nil {
		return err
	}
	// Kata's record of the sandbox: plain files.
	if err := os.RemoveAll(filepath.Join("/run/vc/sbs", id)); err != nil {
		return err
	}
	return removeCgroups(id)
}

// removeCgroups removes the shim's cgroups: Kata names them for the sandbox, below a parent of the
// container's choice; cgroup v1 has one of them for each controller.
func removeCgroups(id string) error {
	for _, pattern := range []string{"/sys/fs/cgroup/*/kata_", "/sys/fs/cgroup/*/*/kata_"} {
		cgroups, err := filepath.Glob(pattern + id)
		if err != nil {
			return err
		}
		for _, cgroup := range cgroups {
			if err := unix.Rmdir(cgroup); err != nil && !errors.Is(err, unix.ENOENT) {
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
	for i := len(mounts) - 1; i >= 0; i-- { // the last one mounted lies on top
		err := unix.Unmount(mounts[i].Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: it went along with another
			return fmt.Errorf("unmount %s: %w", mounts[i].Mountpoint, err)
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
