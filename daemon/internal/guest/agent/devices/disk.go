// Package devices finds the guest's devices and loads their drivers.
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

// maxPCISlots bounds the length of a PCI path: one slot for each bridge on the way, and the device's.
const maxPCISlots = 8

// FindDisk finds the virtio disk at one of Kata's PCI paths.
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

// diskGlob returns where the kernel shows the disk at one of Kata's PCI paths: the slot on each bus
// on the way, in hex, such as "02/01".
func diskGlob(path string) (string, error) {
	if strings.Count(path, "/") >= maxPCISlots {
		return "", refusal.Invalid("PCI path of more than %d slots", maxPCISlots)
	}
	glob := "/sys/devices/pci0000:00"
	for slot := range strings.SplitSeq(path, "/") {
		if n, err := strconv.ParseUint(slot, 16, 8); err != nil || n > 0x1f || slot != fmt.Sprintf("%02x", n) {
			return "", refusal.Invalid("PCI path %q", path)
		}
		glob += "/0000:*:" + slot + ".0"
	}
	return glob + "/virtio*/block/*", nil
}

// findDisk waits for the disk whose directory in sysfs matches glob, and returns its file.
func findDisk(ctx context.Context, glob string) (file string, err error) {
	err = WaitFor(ctx, func() error {
		found, err := filepath.Glob(glob)
		if err != nil {
			return err
		}
		if len(found) != 1 {
			return ErrNotYet
		}
		// The file is there before the disk is.
		file = "/dev/" + filepath.Base(found[0])
		f, err := os.Open(file)
		if err != nil {
			return ErrNotYet
		}
		return f.Close()
	})
	return file, err
}
