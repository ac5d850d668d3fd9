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
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

// hotplugLimit bounds each wait for something that the host plugs in. The kernel's command line may
// change it, before anything else runs.
var hotplugLimit = 10 * time.Second

// maxPCISlots bounds the length of a PCI path: one slot for each bridge on the way, and the device's.
const maxPCISlots = 8

// errNotYet is how a try of plugged says that it is worth another one.
var errNotYet = errors.New("not yet")

// plugged tries until the host's device is there, that is, until try returns something else than
// errNotYet. Polling sysfs needs no state and misses nothing, as a listener for events would what
// came before it.
func plugged(ctx context.Context, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, hotplugLimit)
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

// diskFinders wait for a disk of the host's and return its file. They are named as the drivers of
// Kata's storages and the types of its devices.
var diskFinders = map[string]func(ctx context.Context, address string) (string, error){
	"blk":     findPCIDisk,
	"scsi":    findSCSIDisk,
	"mmioblk": func(ctx context.Context, file string) (string, error) { return findNamedDisk(ctx, file, "vd") },
	"nvdimm":  func(ctx context.Context, file string) (string, error) { return findNamedDisk(ctx, file, "pmem") },
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
		return "", invalid("PCI path of more than %d slots", maxPCISlots)
	}
	glob := "/sys/devices/pci0000:00"
	for slot := range strings.SplitSeq(path, "/") {
		if n, err := strconv.ParseUint(slot, 16, 8); err != nil || n > 0x1f || slot != fmt.Sprintf("%02x", n) {
			return "", invalid("PCI path %q", path)
		}
		glob += "/0000:*:" + slot + ".0"
	}
	return glob + "/virtio*/block/*", nil
}

// findSCSIDisk finds the disk at an id and unit of the machine's virtio controller, "ID:LUN".
func findSCSIDisk(ctx context.Context, address string) (string, error) {
	id, lun, ok := strings.Cut(address, ":")
	for _, n := range []string{id, lun} {
		if v, err := strconv.ParseUint(n, 10, 16); !ok || err != nil || n != strconv.FormatUint(v, 10) {
			return "", invalid("SCSI address %q", address)
		}
	}
	for _, module := range []string{"virtio_scsi", "sd_mod"} {
		if err := needModule(module, ""); err != nil {
			return "", err
		}
	}
	host, err := scsiHost(ctx)
	if err != nil {
		return "", fmt.Errorf("SCSI controller: %w", err)
	}
	// The kernel does not look by itself at what was plugged in before its driver.
	if err := os.WriteFile(filepath.Join("/sys/class/scsi_host", "host"+host, "scan"), []byte("0 "+id+" "+lun), 0); err != nil {
		return "", fmt.Errorf("scan the SCSI bus: %w", err)
	}
	file, err := findDisk(ctx, fmt.Sprintf("/sys/bus/scsi/devices/%s:0:%s:%s/block/*", host, id, lun))
	if err != nil {
		return "", fmt.Errorf("disk at SCSI address %s: %w", address, err)
	}
	return file, nil
}

// scsiHost returns the number of the virtio controller.
func scsiHost(ctx context.Context) (number string, err error) {
	err = plugged(ctx, func() error {
		names, err := filepath.Glob("/sys/class/scsi_host/host*/proc_name")
		if err != nil {
			return err
		}
		for _, file := range names {
			if driver, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(driver)) == "virtio_scsi" {
				number = strings.TrimPrefix(filepath.Base(filepath.Dir(file)), "host")
				return nil
			}
		}
		return errNotYet
	})
	return number, err
}

// findNamedDisk finds a disk that the host calls by its file in the guest, such as /dev/vda.
func findNamedDisk(ctx context.Context, file, kind string) (string, error) {
	name, ok := strings.CutPrefix(file, "/dev/"+kind)
	if !ok || name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return "", invalid("disk %q is not one of /dev/%s*", file, kind)
	}
	if _, err := findDisk(ctx, "/sys/class/block/"+filepath.Base(file)); err != nil {
		return "", fmt.Errorf("disk %s: %w", file, err)
	}
	return file, nil
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

// addDevices waits for the host's devices, and puts their numbers into what a container's spec says
// of them: the host numbers them otherwise.
func addDevices(ctx context.Context, devices []*pb.Device, linux *pb.Linux) error {
	type number struct {
		kind         string
		major, minor int64
	}
	guest := make(map[number]number) // by the host's
	for _, d := range devices {
		find := diskFinders[d.GetType()]
		if find == nil {
			return fmt.Errorf("device %s of type %q: %w", d.GetContainerPath(), d.GetType(), errUnsupported)
		}
		address := d.Id
		if d.Type == "mmioblk" || d.Type == "nvdimm" {
			address = d.VmPath
		}
		file, err := find(ctx, address)
		if err != nil {
			return err
		}
		if d.ContainerPath == "" {
			continue // it only has to be there
		}
		var st unix.Stat_t
		if err := unix.Stat(file, &st); err != nil {
			return err
		}
		spec := specDevice(linux, d.ContainerPath)
		if spec == nil {
			return invalid("the container's spec has no device %q", d.ContainerPath)
		}
		now := number{"b", int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))}
		guest[number{spec.Type, spec.Major, spec.Minor}] = now
		spec.Type, spec.Major, spec.Minor = now.kind, now.major, now.minor
	}
	for _, rule := range linux.GetResources().GetDevices() {
		if now, ok := guest[number{rule.GetType(), rule.GetMajor(), rule.GetMinor()}]; ok {
			rule.Type, rule.Major, rule.Minor = now.kind, now.major, now.minor
		}
	}
	return nil
}

func specDevice(linux *pb.Linux, path string) *pb.LinuxDevice {
	for _, d := range linux.GetDevices() {
		if d.GetPath() == path {
			return d
		}
	}
	return nil
}
