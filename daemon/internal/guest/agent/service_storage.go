package agent

import (
	"context"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/msbd/msbd/daemon/internal/guest/agent/storage"
)

// CopyFile puts a file, a directory or a link into the guest.
func (a *agent) CopyFile(_ context.Context, req *pb.CopyFileRequest) (*emptypb.Empty, error) {
	return done(storage.CopyFile(req))
}

// GetVolumeStats returns how full a storage is.
func (a *agent) GetVolumeStats(_ context.Context, req *pb.VolumeStatsRequest) (*pb.VolumeStatsResponse, error) {
	return a.storages.Stats(req.VolumeGuestPath)
}

// RemoveStaleVirtiofsShareMounts unmounts shared file systems that the host took away.
func (a *agent) RemoveStaleVirtiofsShareMounts(context.Context, *pb.RemoveStaleVirtiofsShareMountsRequest) (*emptypb.Empty, error) {
	return done(storage.DetachStaleShares())
}
