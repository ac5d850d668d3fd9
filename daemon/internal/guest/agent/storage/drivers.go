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
	// createDirectory is the prefix of a driver option that names a directory for an overlay. The guest has to create it.
	createDirectory = "io.katacontainers.volume.overlayfs.create_directory="
	// runtimeOptions is the prefix of options of the shim. They are not options of the file system.
	runtimeOptions = "io.katacontainers."
)

// drivers are the storage drivers by name. Each function attaches the storage st at s.mountPoint.
var drivers = map[string]func(ctx context.Context, st *pb.Storage, s *storage) error{
	"blk":       attachDisk,
	"ephemeral": attachMemory,
	"overlayfs": attachOverlay,
	"virtio-fs": attachMount,
}

func attachMount(_ context.Context, st *pb.Storage, s *storage) error {
	return mountStorage(s, st.Source, st.Fstype, st.Options)
}

// attachMemory mounts a file system in memory.
func attachMemory(ctx context.Context, st *pb.Storage, s *storage) error {
	if st.Fstype == "hugetlbfs" {
		return fmt.Errorf("huge pages: %w", refusal.ErrUnsupported)
	}
	return attachMount(ctx, st, s)
}

// attachDisk waits for a disk and mounts its file system.
func attachDisk(ctx context.Context, st *pb.Storage, s *storage) error {
	if st.Fstype == "bind" || st.Fstype == "" {
		return fmt.Errorf("disk without a file system: %w", refusal.ErrUnsupported)
	}
	disk, err := devices.FindDisk(ctx, st.Source)
	if err != nil {
		return err
	}
	return mountStorage(s, disk, st.Fstype, st.Options)
}

// attachOverlay creates the directories that the driver options name, and mounts an overlay.
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

// mountStorage creates the mount point and mounts a file system there.
func mountStorage(s *storage, source, fstype string, options []string) error {
	if err := os.MkdirAll(s.mountPoint, 0o755); err != nil {
		return err
	}
	o := mount.ParseOptions(withoutRuntimeOptions(options))
	err := unix.Mount(source, s.mountPoint, fstype, o.Flags(), o.Data)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EROFS) {
		// The disk is read-only. Mount it read-only, as mount(8) does.
		err = unix.Mount(source, s.mountPoint, fstype, o.Flags()|unix.MS_RDONLY, o.Data)
	}
	if err != nil {
		return fmt.Errorf("mount %s %s with options %q: %w", fstype, source, options, err)
	}
	s.mounted = true
	return nil
}

// withoutRuntimeOptions returns options without the options that are meant for the shim.
func withoutRuntimeOptions(options []string) []string {
	var rest []string
	for _, o := range options {
		if !strings.HasPrefix(o, runtimeOptions) {
			rest = append(rest, o)
		}
	}
	return rest
}
