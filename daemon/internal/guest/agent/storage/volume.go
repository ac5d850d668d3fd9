package storage

import (
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

// Stats returns how much of the storage at a mount point is in use, in bytes and inodes. The error is of class
// errdefs.ErrNotFound if no storage is attached there.
func (s *Set) Stats(point string) (*pb.VolumeStatsResponse, error) {
	if err := s.checkAdded(point); err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(point, &st); err != nil {
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
