package storage

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/guest/agent/devices"
)

// The serial numbers of the disks from which DiskRoot makes a root file system.
const (
	imageSerial = "msb-image" // the image, in an erofs file system
	upperSerial = "msb-upper" // what the container changes, in an ext4 file system
)

// The mount points of DiskRoot. upperDir and workDir are directories on the upper disk.
const (
	diskImage = "/run/msb/image"
	diskUpper = "/run/msb/upper"
	diskRoot  = "/run/msb/root"
	upperDir  = diskUpper + "/upper"
	workDir   = diskUpper + "/work"
)

// DiskRoot attaches the root file system of a container that has its root on two disks. It is an overlay of the
// read-only image disk and the upper disk. The container sees neither of the two file systems below the overlay. DiskRoot
// returns the root's directory, and the mount points to pass to Remove. On an error, it undoes its changes. It returns
// errdefs.ErrNotFound if there are no such disks, and errdefs.ErrFailedPrecondition if another container uses them.
func (s *Set) DiskRoot(ctx context.Context) (root string, mountPoints []string, err error) {
	if s.checkAdded(diskRoot) == nil {
		return "", nil, fmt.Errorf("another container has its root on the disks: %w", errdefs.ErrFailedPrecondition)
	}
	mountPoints, err = s.add([]request{
		{diskImage, func(st *storage) error { return mountDisk(ctx, st, imageSerial, "erofs", []string{"ro"}) }},
		{diskUpper, func(st *storage) error {
			// The file system ends with the sandbox, so neither initialize inode tables that nobody has used nor read the bitmaps of
			// all blocks in advance. With discard, the host gets back the space of removed files.
			return mountDisk(ctx, st, upperSerial, "ext4", []string{"noinit_itable", "no_prefetch_block_bitmaps", "discard"})
		}},
		{diskRoot, func(st *storage) error {
			if err := makeUpper(); err != nil {
				return err
			}
			return mountStorage(st, "overlay", "overlay", []string{"lowerdir=" + diskImage, "upperdir=" + upperDir, "workdir=" + workDir})
		}},
	})
	if err != nil {
		return "", nil, fmt.Errorf("root on disks: %w", err)
	}
	return diskRoot, mountPoints, nil
}

// mountDisk waits for the disk with a serial number and mounts its file system.
func mountDisk(ctx context.Context, s *storage, serial, fstype string, options []string) error {
	disk, err := devices.FindDiskBySerial(ctx, serial)
	if err == nil {
		err = devices.Unschedule(disk)
	}
	if err != nil {
		return err
	}
	return mountStorage(s, disk, fstype, options)
}

// makeUpper creates the directories on the upper disk, unless they exist. The container's root directory has the owner
// and the mode of upperDir.
func makeUpper() error {
	for _, dir := range []string{upperDir, workDir} {
		if err := os.Mkdir(dir, 0o755); errors.Is(err, os.ErrExist) {
			continue
		} else if err != nil {
			return err
		}
		if err := os.Chmod(dir, 0o755); err != nil { // whatever the umask is
			return err
		}
	}
	return nil
}
