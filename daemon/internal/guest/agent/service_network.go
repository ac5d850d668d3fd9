package agent

import (
	"context"

	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/msbd/msbd/daemon/internal/guest/agent/network"
)

// UpdateInterface configures a network interface.
func (a *agent) UpdateInterface(ctx context.Context, req *pb.UpdateInterfaceRequest) (*protocols.Interface, error) {
	return network.UpdateInterface(ctx, a.log, req.Interface)
}

// ListInterfaces returns the network interfaces and their addresses.
func (a *agent) ListInterfaces(context.Context, *pb.ListInterfacesRequest) (*pb.Interfaces, error) {
	return network.Interfaces()
}

// UpdateRoutes adds or replaces routes.
func (a *agent) UpdateRoutes(ctx context.Context, req *pb.UpdateRoutesRequest) (*pb.Routes, error) {
	return network.UpdateRoutes(ctx, req.GetRoutes().GetRoutes())
}

// ListRoutes returns the routes in the main routing table.
func (a *agent) ListRoutes(context.Context, *pb.ListRoutesRequest) (*pb.Routes, error) {
	return network.Routes()
}

// AddARPNeighbors adds or replaces entries of the neighbor table.
func (a *agent) AddARPNeighbors(ctx context.Context, req *pb.AddARPNeighborsRequest) (*emptypb.Empty, error) {
	return emptyResponse(network.UpdateNeighbors(ctx, req.GetNeighbors().GetARPNeighbors()))
}
