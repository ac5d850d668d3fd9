// Package devices waits for the guest's devices and loads their drivers.
package devices

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

// maxPCISlots is the maximum length of a PCI path, which has a slot for each bridge and one for the device.
const maxPCISlots = 8

// FindDisk waits for the virtio disk at path, which is a PCI path in Kata's notation, such as "02/01", and returns its
// device file. It returns errdefs.ErrInvalidArgument if path is not valid, and errdefs.ErrNotFound if the disk does not
// appear within the timeout of WaitFor.
func FindDisk(ctx context.Context, path string) (string, error) {
	glob, err := diskGlob(path)
	if err != nil {
		return "", err
	}
	file, err := findDisk(ctx, glob)
	if err != nil {
		return "", fmt.Errorf("disk at PCI path %s: %w", path, err)
	}
	return file, nil
}

// diskGlob returns a glob for the directory in sysfs of the disk at path, which is a PCI path in Kata's notation. Such
// a path consists of the slot on each bus, as two hexadecimal digits, separated by slashes.
func diskGlob(path string) (string, error) {
	if strings.Count(path, "/") >= maxPCISlots {
		return "", refusal.Invalid("PCI path has more than %d slots", maxPCISlots)
	}
	glob := "/sys/devices/pci0000:00"
	for slot := range strings.SplitSeq(path, "/") {
		if n, err := strconv.ParseUint(slot, 16, 8); err != nil || n > 0x1f || slot != fmt.Sprintf("%02x", n) {
			return "", refusal.Invalid("invalid PCI path %q", path)
		}
		glob += "/0000:*:" + slot + ".0"
	}
	return glob + "/virtio*/block/*", nil
}

// FindDiskBySerial waits for the disk with a serial number and returns its device file. It returns errdefs.ErrNotFound if
// the disk does not appear within the timeout of WaitFor.
func FindDiskBySerial(ctx context.Context, serial string) (file string, err error) {
	err = WaitFor(ctx, func() error {
		disk, ok := diskWithSerial(sysBlock, serial)
		if !ok {
			return ErrNotYet
		}
		file = "/dev/" + disk
		return canOpen(file)
	})
	if err != nil {
		return "", fmt.Errorf("disk with the serial number %s: %w", serial, err)
	}
	return file, nil
}

// Unschedule makes the kernel pass the requests for a disk to the host as they come. By default it sorts and delays them, as is good
// for a disk that one machine has for itself. disk is the device file.
func Unschedule(disk string) error {
	queue := filepath.Join(sysBlock, filepath.Base(disk), "queue")
	for _, setting := range [][2]string{{"scheduler", "none"}, {"wbt_lat_usec", "0"}} {
		err := os.WriteFile(filepath.Join(queue, setting[0]), []byte(setting[1]), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // the kernel may not have it
			return fmt.Errorf("set up the queue of a disk: %w", err)
		}
	}
	return nil
}

// sysBlock is the directory in sysfs that lists the disks.
const sysBlock = "/sys/block"

// diskWithSerial returns the name of the disk with a serial number, of those in sysfs, which is sysBlock.
func diskWithSerial(sysfs, serial string) (name string, ok bool) {
	files, _ := filepath.Glob(filepath.Join(sysfs, "*", "serial"))
	for _, f := range files {
		if data, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(data)) == serial {
			return filepath.Base(filepath.Dir(f)), true
		}
	}
	return "", false
}

// findDisk waits for the disk whose directory in sysfs matches glob, and returns its device file.
func findDisk(ctx context.Context, glob string) (file string, err error) {
	err = WaitFor(ctx, func() error {
		found, err := filepath.Glob(glob)
		if err != nil {
			return err
		}
		if len(found) != 1 {
			return ErrNotYet
		}
		file = "/dev/" + filepath.Base(found[0])
		return canOpen(file)
	})
	return file, err
}

// canOpen returns ErrNotYet if a disk's device file cannot be opened. The kernel creates the file before that.
func canOpen(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return ErrNotYet
	}
	return f.Close()
}
