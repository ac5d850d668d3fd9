package agent

import (
	"context"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/msbd/msbd/daemon/internal/guest/agent/storage"
)

// CopyFile creates a file, a directory or a symbolic link in the guest.
func (a *agent) CopyFile(_ context.Context, req *pb.CopyFileRequest) (*emptypb.Empty, error) {
	return emptyResponse(storage.CopyFile(req))
}

// GetVolumeStats returns how much of a storage is in use.
func (a *agent) GetVolumeStats(_ context.Context, req *pb.VolumeStatsRequest) (*pb.VolumeStatsResponse, error) {
	return a.storages.Stats(req.VolumeGuestPath)
}

// RemoveStaleVirtiofsShareMounts unmounts shared file systems that the host has removed.
func (a *agent) RemoveStaleVirtiofsShareMounts(context.Context, *pb.RemoveStaleVirtiofsShareMountsRequest) (*emptypb.Empty, error) {
	return emptyResponse(storage.DetachStaleShares())
}
