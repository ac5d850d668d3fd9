package guestagent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

const (
	// shareTag is the virtiofs device that holds the containers' root file systems.
	shareTag = "kataShared"
	// shimShare is where the shim believes that it is mounted; it also copies single files there.
	shimShare = "/run/kata-containers/shared/containers"
	// ownShare is where the agent mounts it when the shim does not ask for it.
	ownShare = "/run/msb/share"
	// diskLimit bounds the wait for a hot-plugged disk.
	diskLimit = 10 * time.Second
)

// storageDrivers are the kinds of storage that the host may ask for.
var storageDrivers = []string{"virtio-fs", "ephemeral", "local", "bind", "blk", "overlayfs"}

// storages knows which mount points are in use, and by how many.
type storages struct {
	mu    sync.Mutex
	users map[string]int
}

// add makes each storage available, in order, and returns the mount points. On an error it takes
// back what it did.
func (s *storages) add(ctx context.Context, list []*pb.Storage) (points []string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		if err != nil {
			err = errors.Join(err, s.drop(points))
			points = nil
		}
	}()
	for _, st := range list {
		if st == nil || !filepath.IsAbs(st.MountPoint) {
			return points, invalid("storage mount point %q is not absolute", st.GetMountPoint())
		}
		point := filepath.Clean(st.MountPoint)
		if s.users[point] == 0 {
			if err := attachStorage(ctx, st, point); err != nil {
				return points, fmt.Errorf("storage %s at %s: %w", st.Driver, point, err)
			}
		}
		s.users[point]++
		points = append(points, point)
	}
	return points, nil
}

// remove ends one use of each mount point.
func (s *storages) remove(points []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.drop(points)
}

func (s *storages) drop(points []string) error {
	var errs []error
	for i := len(points) - 1; i >= 0; i-- {
		point := points[i]
		if s.users[point]--; s.users[point] > 0 {
			continue
		}
		delete(s.users, point)
		// A storage of driver "local" is no mount.
		if err := unix.Unmount(point, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", point, err))
		}
	}
	return errors.Join(errs...)
}

// resize gives mounted memory-backed storages new options, such as a size.
func (s *storages) resize(list []*pb.Storage) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, st := range list {
		point := filepath.Clean(st.GetMountPoint())
		if st.GetDriver() != "ephemeral" || s.users[point] == 0 {
			return fmt.Errorf("ephemeral storage at %q: %w", point, errdefs.ErrNotFound)
		}
		options, _ := splitStorageOptions(st.Options)
		o := parseMountOptions(options)
		if err := unix.Mount("", point, "", o.flags()|unix.MS_REMOUNT, o.data); err != nil {
			return fmt.Errorf("remount %s: %w", point, err)
		}
	}
	return nil
}

// share mounts the containers' file systems for a shim that does not ask for it.
func (s *storages) share(ctx context.Context) error {
	s.mu.Lock()
	mounted := s.users[ownShare] > 0
	s.mu.Unlock()
	if mounted {
		return nil
	}
	_, err := s.add(ctx, []*pb.Storage{{Driver: "virtio-fs", Source: shareTag, Fstype: "virtiofs", MountPoint: ownShare}})
	return err
}

func attachStorage(ctx context.Context, st *pb.Storage, point string) error {
	options, own := splitStorageOptions(st.Options)
	switch st.Driver {
	case "virtio-fs", "overlayfs":
		return mountStorage(st.Source, point, st.Fstype, options)
	case "ephemeral":
		if err := mountStorage(st.Source, point, st.Fstype, options); err != nil {
			return err
		}
		return own.apply(point)
	case "local":
		if err := os.MkdirAll(point, 0o755); err != nil {
			return err
		}
		return own.withMode(options).apply(point)
	case "bind":
		return bindStorage(st.Source, point)
	case "blk":
		disk, err := findDisk(ctx, st.Source)
		if err != nil {
			return err
		}
		if st.Fstype == "bind" {
			return bindStorage(disk, point)
		}
		return mountStorage(disk, point, st.Fstype, options)
	default:
		return invalid("unknown driver %q", st.Driver)
	}
}

func mountStorage(source, point, fstype string, options []string) error {
	if err := os.MkdirAll(point, 0o755); err != nil {
		return err
	}
	o := parseMountOptions(options)
	if err := unix.Mount(source, point, fstype, o.flags(), o.data); err != nil {
		return fmt.Errorf("mount %s %s: %w", fstype, source, err)
	}
	return nil
}

func bindStorage(source, point string) error {
	st, err := os.Stat(source)
	if err != nil {
		return err
	}
	if point, err = makeMountpoint(point, st.IsDir()); err != nil {
		return err
	}
	return unix.Mount(source, point, "", unix.MS_BIND|unix.MS_REC, "")
}

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
	if o.gid >= 0 {
		if err := os.Chown(path, -1, o.gid); err != nil {
			return err
		}
		// Files made in it belong to the group too, and its members may make some.
		o.mode |= os.ModeSetgid | 0o775
	}
	if o.mode == 0 {
		return nil
	}
	return os.Chmod(path, o.mode)
}

// diskGlob returns where the kernel shows the disk at one of Kata's PCI paths: the slot on each bus
// on the way, in hex, such as "02/01".
func diskGlob(path string) (string, error) {
	glob := "/sys/devices/pci0000:00"
	for slot := range strings.SplitSeq(path, "/") {
		if n, err := strconv.ParseUint(slot, 16, 8); err != nil || slot != fmt.Sprintf("%02x", n) {
			return "", invalid("PCI path %q", path)
		}
		glob += "/0000:*:" + slot + ".0"
	}
	return glob + "/virtio*/block/*", nil
}

// findDisk waits for the disk at a PCI path and returns its device file.
func findDisk(ctx context.Context, path string) (string, error) {
	glob, err := diskGlob(path)
	if err != nil {
		return "", err
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	ctx, cancel := context.WithTimeout(ctx, diskLimit)
	defer cancel()
	for {
		if found, _ := filepath.Glob(glob); len(found) == 1 {
			device := "/dev/" + filepath.Base(found[0])
			if _, err := os.Stat(device); err == nil {
				return device, nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", fmt.Errorf("no disk at PCI path %s: %w", path, errdefs.ErrNotFound)
		}
	}
}

// detachStaleShares lets go of the file systems below the share that the host has taken away.
func detachStaleShares() error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	var errs []error
	for _, point := range virtiofsMounts(string(mounts)) {
		if _, err := os.Stat(point); errors.Is(err, os.ErrNotExist) {
			if err := unix.Unmount(point, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
				errs = append(errs, fmt.Errorf("unmount %s: %w", point, err))
			}
		}
	}
	return errors.Join(errs...)
}

// virtiofsMounts returns the mount points of type virtiofs in a file like /proc/mounts.
func virtiofsMounts(mounts string) []string {
	var points []string
	for line := range strings.Lines(mounts) {
		if f := strings.Fields(line); len(f) >= 3 && f[2] == "virtiofs" {
			points = append(points, unescapeMount(f[1]))
		}
	}
	return points
}

// unescapeMount undoes the octal escapes of /proc/mounts.
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
