package agent

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
)

// testInterfaces plugs in network interfaces, swaps their names, and uses their addresses immediately.
func (s *stock) testInterfaces(t *testing.T) {
	ctx := t.Context()
	const second, third = "52:54:00:00:00:02", "52:54:00:00:00:03"
	for i, mac := range []string{second, third} {
		id := fmt.Sprintf("interface%d", i+1)
		s.qmp.do(t, "netdev_add", map[string]any{"type": "user", "id": id, "restrict": true})
		s.qmp.do(t, "device_add", map[string]any{
			"driver": "virtio-net-pci", "id": "dev-" + id, "netdev": id, "mac": mac, "bus": plugBridge, "addr": fmt.Sprintf("%02x", 0x18+i),
		})
	}
	v4, v6 := protocols.IPFamily_v4, protocols.IPFamily_v6
	for range 2 {
		for _, i := range []*protocols.Interface{
			// The kernel has named another interface eth0, the first one.
			{Name: "eth0", HwAddr: second, Mtu: 1450, DevicePath: bridgeSlot + "/18", IPAddresses: []*protocols.IPAddress{
				{Family: v4, Address: "10.8.0.2", Mask: "24"}, {Family: v4, Address: "10.8.1.2", Mask: "16"},
				{Family: v6, Address: "fd00:8::2", Mask: "64"}, {Family: v6, Address: "fe80::5054:ff:fe00:2", Mask: "64"}}},
			{Name: "net1", HwAddr: testMAC, Mtu: 9000, IPAddresses: []*protocols.IPAddress{{Family: v6, Address: "fd00:9::2", Mask: "128"}}},
			{Name: "noarp0", HwAddr: third, RawFlags: 0x80, IPAddresses: []*protocols.IPAddress{{Family: v4, Address: "10.7.0.2", Mask: "32"}}},
		} {
			ok(t)(s.UpdateInterface(ctx, &pb.UpdateInterfaceRequest{Interface: i}))
		}
		ok(t)(s.UpdateRoutes(ctx, &pb.UpdateRoutesRequest{Routes: &pb.Routes{Routes: []*protocols.Route{
			{Gateway: "169.254.1.1", Device: "eth0", Mtu: 1400},                    // the next route leads to the gateway
			{Dest: "169.254.1.1/32", Device: "eth0", Scope: 253},                   // link scope
			{Gateway: "fe80::1", Device: "eth0", Family: v6},                       // the kernel's own route leads to the gateway
			{Dest: "10.99.0.0/16", Gateway: "192.0.2.1", Device: "net1", Flags: 4}, // RTNH_F_ONLINK: no route leads to the gateway
			{Dest: "fd00:77::/48", Gateway: "fd00:8::1", Device: "eth0", Family: v6, Source: "fd00:8::2"},
			{Dest: "10.6.0.1", Device: "noarp0", Scope: 253, Source: "10.7.0.2/32"},
		}}}))
		ok(t)(s.AddARPNeighbors(ctx, &pb.AddARPNeighborsRequest{Neighbors: &pb.ARPNeighbors{ARPNeighbors: []*protocols.ARPNeighbor{
			{ToIPAddress: &protocols.IPAddress{Address: "169.254.1.1"}, Device: "eth0", Lladdr: "02:00:00:00:00:11", State: 0x80},
			{ToIPAddress: &protocols.IPAddress{Family: v6, Address: "fd00:8::1"}, Device: "eth0", Lladdr: "02:00:00:00:00:12"},
		}}}))
	}
	s.checkOutput(t, mainID, "listening\n", "listen", "[fd00:8::2]:8080") // fails if the address is still tentative
	s.checkOutput(t, mainID, "listening\n", "listen", "10.8.1.2:8080")
	s.checkOutput(t, mainID, "true\n", "neighbor", "02:00:00:00:00:11")
	s.checkOutput(t, mainID, "true\n", "neighbor", "02:00:00:00:00:12")

	interfaces, err := s.ListInterfaces(ctx, &pb.ListInterfacesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]string)
	for _, i := range interfaces.Interfaces {
		var addresses []string
		for _, a := range i.IPAddresses {
			if !net.ParseIP(a.Address).IsLinkLocalUnicast() {
				addresses = append(addresses, a.Address+"/"+a.Mask)
			}
		}
		slices.Sort(addresses)
		got[i.Name] = fmt.Sprint(i.HwAddr, i.Mtu, addresses, i.RawFlags)
	}
	for name, want := range map[string]string{
		"eth0":   fmt.Sprint(second, 1450, []string{"10.8.0.2/24", "10.8.1.2/16", "fd00:8::2/64"}, 0),
		"net1":   fmt.Sprint(testMAC, 9000, []string{"fd00:9::2/128"}, 0),
		"noarp0": fmt.Sprint(third, 1500, []string{"10.7.0.2/32"}, 0x80),
	} {
		if got[name] != want {
			t.Errorf("%s is %s, want %s", name, got[name], want)
		}
	}
	routes, err := s.ListRoutes(ctx, &pb.ListRoutesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	count := make(map[string]int)
	for _, r := range routes.Routes {
		count[fmt.Sprint(r.Dest, " ", r.Gateway, " ", r.Device, " ", r.Mtu)]++
	}
	for _, want := range []string{
		" 169.254.1.1 eth0 1400", "169.254.1.1/32  eth0 0", " fe80::1 eth0 0", "10.99.0.0/16 192.0.2.1 net1 0",
		"fd00:77::/48 fd00:8::1 eth0 0", "10.6.0.1/32  noarp0 0",
	} {
		if count[want] != 1 {
			t.Errorf("%d routes %q, want 1: %v", count[want], want, routes.Routes)
		}
	}
	stats, err := s.StatsContainer(ctx, &pb.StatsContainerRequest{ContainerId: mainID})
	if err != nil || len(stats.NetworkStats) != 3 {
		t.Errorf("statistics of %d interfaces, %v; want 3", len(stats.GetNetworkStats()), err)
	}
}

// testClock sets the clock and reseeds the random number generator, as the shim does for a restored guest.
func (s *stock) testClock(t *testing.T) {
	ctx := t.Context()
	then := time.Date(2031, 2, 3, 4, 5, 6, 0, time.UTC)
	ok(t)(s.SetGuestDateTime(ctx, &pb.SetGuestDateTimeRequest{Sec: then.Unix(), Usec: 999_999}))
	r := s.run(t, mainID, "now", privileged("now"))
	if now, err := strconv.ParseInt(strings.TrimSpace(r.stdout), 10, 64); err != nil || now < then.Unix() || now > then.Add(bootLimit).Unix() {
		t.Errorf("the guest's time: %v, want %d or a little later", r, then.Unix())
	}
	now := time.Now()
	ok(t)(s.SetGuestDateTime(ctx, &pb.SetGuestDateTimeRequest{Sec: now.Unix(), Usec: int64(now.Nanosecond() / 1000)}))
	seen := make(map[string]bool)
	for i := range 3 {
		ok(t)(s.ReseedRandomDev(ctx, &pb.ReseedRandomDevRequest{Data: []byte(strings.Repeat("same seed", 50))}))
		r := s.run(t, mainID, fmt.Sprint("random", i), privileged("head", "/dev/urandom"))
		if seen[r.stdout] || len(r.stdout) < 512 {
			t.Errorf("random numbers are too short or the same as before: %v", r)
		}
		seen[r.stdout] = true
	}
}
