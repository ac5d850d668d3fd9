package agent

import (
	"context"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

// This file has the methods of AgentService that this guest does not support. A shim with msbd's configuration never
// calls them.

// GetIPTables is not supported.
func (a *agent) GetIPTables(context.Context, *pb.GetIPTablesRequest) (*pb.GetIPTablesResponse, error) {
	return nil, refusal.ErrUnsupported
}

// SetIPTables is not supported.
func (a *agent) SetIPTables(context.Context, *pb.SetIPTablesRequest) (*pb.SetIPTablesResponse, error) {
	return nil, refusal.ErrUnsupported
}

// MemAgentMemcgSet is not supported.
func (a *agent) MemAgentMemcgSet(context.Context, *pb.MemAgentMemcgConfig) (*emptypb.Empty, error) {
	return nil, refusal.ErrUnsupported
}

// MemAgentCompactSet is not supported.
func (a *agent) MemAgentCompactSet(context.Context, *pb.MemAgentCompactConfig) (*emptypb.Empty, error) {
	return nil, refusal.ErrUnsupported
}

// SetPolicy is not supported.
func (a *agent) SetPolicy(context.Context, *pb.SetPolicyRequest) (*emptypb.Empty, error) {
	return nil, refusal.ErrUnsupported
}

// OnlineCPUMem is not supported.
func (a *agent) OnlineCPUMem(context.Context, *pb.OnlineCPUMemRequest) (*emptypb.Empty, error) {
	return nil, refusal.ErrUnsupported
}

// MemHotplugByProbe is not supported.
func (a *agent) MemHotplugByProbe(context.Context, *pb.MemHotplugByProbeRequest) (*emptypb.Empty, error) {
	return nil, refusal.ErrUnsupported
}

// UpdateEphemeralMounts is not supported.
func (a *agent) UpdateEphemeralMounts(context.Context, *pb.UpdateEphemeralMountsRequest) (*emptypb.Empty, error) {
	return nil, refusal.ErrUnsupported
}

// AddSwap is not supported.
func (a *agent) AddSwap(context.Context, *pb.AddSwapRequest) (*emptypb.Empty, error) {
	return nil, refusal.ErrUnsupported
}

// AddSwapPath is not supported.
func (a *agent) AddSwapPath(context.Context, *pb.AddSwapPathRequest) (*emptypb.Empty, error) {
	return nil, refusal.ErrUnsupported
}

// ResizeVolume is not supported.
func (a *agent) ResizeVolume(context.Context, *pb.ResizeVolumeRequest) (*emptypb.Empty, error) {
	return nil, refusal.ErrUnsupported
}
