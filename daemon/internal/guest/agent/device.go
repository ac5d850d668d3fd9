package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

// deviceLimit bounds each wait for a device of the host's.
const deviceLimit = 10 * time.Second

// maxPCISlots bounds the length of a PCI path: one slot for each bridge on the way, and the device's.
const maxPCISlots = 8

// errNotYet makes plugged try again.
var errNotYet = errors.New("not yet")

// plugged calls try until it returns something other than errNotYet, that is, until the host's device
// is there. Polling sysfs needs no state, and unlike a listener for events it does not miss a device
// that came earlier.
func plugged(ctx context.Context, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, deviceLimit)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := try()
		if !errors.Is(err, errNotYet) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("did not appear: %w", errdefs.ErrNotFound)
		}
	}
}

// findPCIDisk finds the virtio disk at one of Kata's PCI paths.
func findPCIDisk(ctx context.Context, path string) (string, error) {
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
	err = plugged(ctx, func() error {
		found, err := filepath.Glob(glob)
		if err != nil {
			return err
		}
		if len(found) != 1 {
			return errNotYet
		}
		// The file is there before the disk is.
		file = "/dev/" + filepath.Base(found[0])
		f, err := os.Open(file)
		if err != nil {
			return errNotYet
		}
		return f.Close()
	})
	return file, err
}
