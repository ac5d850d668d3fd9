package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/agent/devices"
	"github.com/msbd/msbd/daemon/internal/guest/agent/mount"
	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

const (
	// createDirectory is the driver option with a directory that an overlay needs and that only the
	// guest can make.
	createDirectory = "io.katacontainers.volume.overlayfs.create_directory="
	// runtimeOptions is the prefix of the shim's own options among those of a file system.
	runtimeOptions = "io.katacontainers."
)

// drivers are the kinds of storage that the host may ask for. Each makes st available at s.
var drivers = map[string]func(ctx context.Context, st *pb.Storage, s *storage) error{
	"blk":       attachDisk,
	"ephemeral": attachMemory,
	"overlayfs": attachOverlay,
	"virtio-fs": attachMount,
}

func attachMount(_ context.Context, st *pb.Storage, s *storage) error {
	return mountStorage(s, st.Source, st.Fstype, st.Options)
}

// attachMemory mounts a file system that lives in memory.
func attachMemory(ctx context.Context, st *pb.Storage, s *storage) error {
	if st.Fstype == "hugetlbfs" {
		return fmt.Errorf("huge pages: %w", refusal.ErrUnsupported)
	}
	return attachMount(ctx, st, s)
}

// attachDisk mounts a disk's file system.
func attachDisk(ctx context.Context, st *pb.Storage, s *storage) error {
	if st.Fstype == "bind" || st.Fstype == "" {
		return fmt.Errorf("a disk without a file system: %w", refusal.ErrUnsupported)
	}
	disk, err := devices.FindDisk(ctx, st.Source)
	if err != nil {
		return err
	}
	return mountStorage(s, disk, st.Fstype, st.Options)
}

// attachOverlay makes the directories that the shim cannot make, and mounts an overlay.
func attachOverlay(_ context.Context, st *pb.Storage, s *storage) error {
	for _, o := range st.DriverOptions {
		dir, ok := strings.CutPrefix(o, createDirectory)
		if !ok {
			continue
		}
		if filepath.Clean(dir) != dir || !strings.HasPrefix(dir, copyRoot+"/") {
			return refusal.Invalid("overlay directory %q is not below %s", dir, copyRoot)
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		s.dirs = append(s.dirs, dir)
	}
	return mountStorage(s, st.Source, st.Fstype, st.Options)
}

func mountStorage(s *storage, source, fstype string, options []string) error {
	if err := os.MkdirAll(s.point, 0o755); err != nil {
		return err
	}
	o := mount.ParseOptions(withoutRuntimeOptions(options))
	err := unix.Mount(source, s.point, fstype, o.Flags(), o.Data)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EROFS) {
		// The disk cannot be written. mount(8) does the same.
		err = unix.Mount(source, s.point, fstype, o.Flags()|unix.MS_RDONLY, o.Data)
	}
	if err != nil {
		return fmt.Errorf("mount %s %s with options %q: %w", fstype, source, options, err)
	}
	s.mounted = true
	return nil
}

func withoutRuntimeOptions(options []string) []string {
	var rest []string
	for _, o := range options {
		if !strings.HasPrefix(o, runtimeOptions) {
			rest = append(rest, o)
		}
	}
	return rest
}
