package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

// GetVolumeStats says how full a storage is.
func (a *agent) GetVolumeStats(_ context.Context, req *pb.VolumeStatsRequest) (*pb.VolumeStatsResponse, error) {
	st, err := a.volume(req.VolumeGuestPath)
	if err != nil {
		return nil, err
	}
	size := uint64(st.Bsize)
	return &pb.VolumeStatsResponse{
		Usage: []*pb.VolumeUsage{
			{Unit: pb.VolumeUsage_BYTES, Total: st.Blocks * size, Available: st.Bavail * size, Used: (st.Blocks - st.Bfree) * size},
			{Unit: pb.VolumeUsage_INODES, Total: st.Files, Available: st.Ffree, Used: st.Files - st.Ffree},
		},
		VolumeCondition: &pb.VolumeCondition{Message: "OK"},
	}, nil
}

// ResizeVolume lets a storage's file system grow to size bytes, after the host has made its disk
// larger.
func (a *agent) ResizeVolume(_ context.Context, req *pb.ResizeVolumeRequest) (*emptypb.Empty, error) {
	st, err := a.volume(req.VolumeGuestPath)
	if err != nil {
		return nil, err
	}
	if st.Type != unix.EXT4_SUPER_MAGIC {
		return nil, fmt.Errorf("resize %s: only ext4 grows in this guest: %w", req.VolumeGuestPath, errdefs.ErrNotImplemented)
	}
	if req.Size < st.Blocks*uint64(st.Bsize) {
		return nil, invalid("resize %s to %d bytes: it is larger", req.VolumeGuestPath, req.Size)
	}
	fd, err := unix.Open(req.VolumeGuestPath, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	const ext4ResizeFS = 0x40086610 // EXT4_IOC_RESIZE_FS of <linux/ext4.h>
	blocks := req.Size / uint64(st.Bsize)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ext4ResizeFS, uintptr(unsafe.Pointer(&blocks))); errno != 0 {
		return nil, fmt.Errorf("resize %s to %d blocks: %w", req.VolumeGuestPath, blocks, errno)
	}
	return &emptypb.Empty{}, nil
}

// volume returns the state of a storage's file system.
func (a *agent) volume(point string) (st unix.Statfs_t, err error) {
	if err := a.storages.inUse(point); err != nil {
		return st, err
	}
	return st, unix.Statfs(point, &st)
}

// AddSwap swaps to the disk at a PCI path, which the host has formatted.
func (a *agent) AddSwap(ctx context.Context, req *pb.AddSwapRequest) (*emptypb.Empty, error) {
	slots := make([]string, len(req.PCIPath))
	for i, slot := range req.PCIPath {
		slots[i] = fmt.Sprintf("%02x", slot)
	}
	disk, err := findPCIDisk(ctx, strings.Join(slots, "/"))
	if err != nil {
		return nil, err
	}
	return done(swapOn(disk))
}

// AddSwapPath swaps to a file or disk of the guest's.
func (a *agent) AddSwapPath(_ context.Context, req *pb.AddSwapPathRequest) (*emptypb.Empty, error) {
	if filepath.Clean(req.Path) != req.Path || !filepath.IsAbs(req.Path) || strings.ContainsRune(req.Path, 0) {
		return nil, invalid("swap path %q", req.Path)
	}
	return done(swapOn(req.Path))
}

func swapOn(path string) error {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return invalid("swap path %q", path)
	}
	_, _, errno := unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(name)), 0, 0)
	switch {
	case errno == 0 || errno == unix.EBUSY: // in use already
		return nil
	case errors.Is(errno, unix.ENOENT):
		return fmt.Errorf("swap to %s: %w: %w", path, errno, errdefs.ErrNotFound)
	case errors.Is(errno, unix.EINVAL):
		return invalid("swap to %s: it is not formatted for that", path)
	default:
		return fmt.Errorf("swap to %s: %w", path, errno)
	}
}
