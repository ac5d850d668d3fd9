// Package devices waits for the guest's devices and loads their drivers.
package devices

import (
	"context"
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
		// The kernel creates the device file before the disk can be opened.
		file = "/dev/" + filepath.Base(found[0])
		f, err := os.Open(file)
		if err != nil {
			return ErrNotYet
		}
		return f.Close()
	})
	return file, err
}
