package agent

import (
	"slices"
	"strings"
	"testing"

	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
)

// testNetwork configures the guest's network interface as the shim does for tcfilter networking.
func testNetwork(t *testing.T, g *guest) {
	ctx := t.Context()
	for range 2 { // the shim makes these calls twice
		ok(t)(g.UpdateInterface(ctx, &pb.UpdateInterfaceRequest{Interface: &protocols.Interface{
			Device: "eth0", Name: "eth0", HwAddr: strings.ToUpper(testMAC), Mtu: 1400,
			IPAddresses: []*protocols.IPAddress{
				{Address: "10.9.0.2", Mask: "24"},
				{Family: protocols.IPFamily_v6, Address: "fd00:9::2", Mask: "64"},
			},
		}}))
		ok(t)(g.UpdateRoutes(ctx, &pb.UpdateRoutesRequest{Routes: &pb.Routes{Routes: []*protocols.Route{
			{Gateway: "10.9.0.1", Device: "eth0"},
			{Gateway: "fd00:9::1", Device: "eth0", Family: protocols.IPFamily_v6},
			{Dest: "10.9.0.0/24", Device: "eth0", Source: "10.9.0.2", Scope: 253},
		}}}))
		ok(t)(g.AddARPNeighbors(ctx, &pb.AddARPNeighborsRequest{Neighbors: &pb.ARPNeighbors{ARPNeighbors: []*protocols.ARPNeighbor{
			{ToIPAddress: &protocols.IPAddress{Address: "10.9.0.1"}, Device: "eth0", Lladdr: "02:00:00:00:00:01", State: 0x80},
		}}}))
	}
	interfaces, err := g.ListInterfaces(ctx, &pb.ListInterfacesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(interfaces.Interfaces, func(i *protocols.Interface) bool { return i.Name == "eth0" })
	if i < 0 {
		t.Fatalf("interfaces lack eth0: %v", interfaces)
	}
	var addrs []string
	for _, a := range interfaces.Interfaces[i].IPAddresses {
		if !strings.HasPrefix(a.Address, "fe80:") {
			addrs = append(addrs, a.Address+"/"+a.Mask)
		}
	}
	if want := []string{"10.9.0.2/24", "fd00:9::2/64"}; !slices.Equal(addrs, want) || interfaces.Interfaces[i].Mtu != 1400 {
		t.Errorf("eth0 has the addresses %v and MTU %d, want %v and 1400", addrs, interfaces.Interfaces[i].Mtu, want)
	}
	routes, err := g.ListRoutes(ctx, &pb.ListRoutesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, gateway := range []string{"10.9.0.1", "fd00:9::1"} {
		n := 0
		for _, r := range routes.Routes {
			if r.Gateway == gateway && r.Device == "eth0" {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%d routes through %s, want 1: %v", n, gateway, routes.Routes)
		}
	}
	// A new address replaces the first one.
	ok(t)(g.UpdateInterface(ctx, &pb.UpdateInterfaceRequest{Interface: &protocols.Interface{
		Name: "eth0", HwAddr: testMAC, IPAddresses: []*protocols.IPAddress{{Address: "10.9.0.3", Mask: "24"}},
	}}))
	if interfaces, err = g.ListInterfaces(ctx, &pb.ListInterfacesRequest{}); err != nil {
		t.Fatal(err)
	}
	if s := interfaces.String(); strings.Contains(s, "10.9.0.2") || !strings.Contains(s, "10.9.0.3") {
		t.Errorf("interfaces after a change of address: %s, want 10.9.0.3 without 10.9.0.2", s)
	}
}
