package agent

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// The rest of AgentService: requests that a shim with our configuration never makes.

var errUnsupported = fmt.Errorf("not supported by this guest: %w", errdefs.ErrNotImplemented)

// GetIPTables is not supported.
func (a *agent) GetIPTables(context.Context, *pb.GetIPTablesRequest) (*pb.GetIPTablesResponse, error) {
	return nil, errUnsupported
}

// SetIPTables is not supported.
func (a *agent) SetIPTables(context.Context, *pb.SetIPTablesRequest) (*pb.SetIPTablesResponse, error) {
	return nil, errUnsupported
}

// MemAgentMemcgSet is not supported.
func (a *agent) MemAgentMemcgSet(context.Context, *pb.MemAgentMemcgConfig) (*emptypb.Empty, error) {
	return nil, errUnsupported
}

// MemAgentCompactSet is not supported.
func (a *agent) MemAgentCompactSet(context.Context, *pb.MemAgentCompactConfig) (*emptypb.Empty, error) {
	return nil, errUnsupported
}

// SetPolicy is not supported.
func (a *agent) SetPolicy(context.Context, *pb.SetPolicyRequest) (*emptypb.Empty, error) {
	return nil, errUnsupported
}

// OnlineCPUMem is not supported.
func (a *agent) OnlineCPUMem(context.Context, *pb.OnlineCPUMemRequest) (*emptypb.Empty, error) {
	return nil, errUnsupported
}

// MemHotplugByProbe is not supported.
func (a *agent) MemHotplugByProbe(context.Context, *pb.MemHotplugByProbeRequest) (*emptypb.Empty, error) {
	return nil, errUnsupported
}

// UpdateEphemeralMounts is not supported.
func (a *agent) UpdateEphemeralMounts(context.Context, *pb.UpdateEphemeralMountsRequest) (*emptypb.Empty, error) {
	return nil, errUnsupported
}

// AddSwap is not supported.
func (a *agent) AddSwap(context.Context, *pb.AddSwapRequest) (*emptypb.Empty, error) {
	return nil, errUnsupported
}

// AddSwapPath is not supported.
func (a *agent) AddSwapPath(context.Context, *pb.AddSwapPathRequest) (*emptypb.Empty, error) {
	return nil, errUnsupported
}

// ResizeVolume is not supported.
func (a *agent) ResizeVolume(context.Context, *pb.ResizeVolumeRequest) (*emptypb.Empty, error) {
	return nil, errUnsupported
}
