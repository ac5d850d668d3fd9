package storage

import (
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

// Stats returns how much of the storage at mountPoint is in use, in bytes and inodes. It returns errdefs.ErrNotFound if
// no storage is attached there.
func (s *Set) Stats(mountPoint string) (*pb.VolumeStatsResponse, error) {
	if err := s.checkAdded(mountPoint); err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(mountPoint, &st); err != nil {
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
