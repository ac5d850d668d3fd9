package network

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/proto"
)

// FuzzNetworkRequests decodes requests and runs the parts of their handling that do not change the machine.
func FuzzNetworkRequests(f *testing.F) {
	for _, req := range []proto.Message{
		&pb.UpdateInterfaceRequest{Interface: &protocols.Interface{Name: "eth0", IPAddresses: []*protocols.IPAddress{
			nil, {Address: "10.9.0.2", Mask: "24"}, {Family: protocols.IPFamily_v6, Address: "fd00:9::2", Mask: "64"},
		}}},
		&pb.UpdateRoutesRequest{Routes: &pb.Routes{Routes: []*protocols.Route{
			{Dest: "10.9.0.0/24", Device: "eth0", Source: "10.9.0.2", Scope: 253}, {Gateway: "10.9.0.1", Device: "eth0"}, {Gateway: "x"},
		}}},
	} {
		data, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var iface pb.UpdateInterfaceRequest
		if proto.Unmarshal(data, &iface) == nil {
			if _, err := parseAddresses(iface.GetInterface().GetIPAddresses()); err != nil && !errdefs.IsInvalidArgument(err) {
				t.Errorf("parse addresses: %v, want errdefs.ErrInvalidArgument", err)
			}
		}
		var routes pb.UpdateRoutesRequest
		if proto.Unmarshal(data, &routes) == nil {
			for _, r := range routes.GetRoutes().GetRoutes() {
				if _, err := parseRoute(r); err != nil && !errdefs.IsInvalidArgument(err) {
					t.Errorf("parse route: %v, want errdefs.ErrInvalidArgument", err)
				}
			}
		}
	})
}
