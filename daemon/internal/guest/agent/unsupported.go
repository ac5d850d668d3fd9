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
