package agent

import (
	"context"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

// GetVolumeStats returns how full a storage is.
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

// volume returns the state of a storage's file system.
func (a *agent) volume(point string) (st unix.Statfs_t, err error) {
	if err := a.storages.inUse(point); err != nil {
		return st, err
	}
	return st, unix.Statfs(point, &st)
}
