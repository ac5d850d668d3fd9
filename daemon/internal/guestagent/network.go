package guestagent

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

// linkLimit bounds the wait for a network card: a hot-plugged one may appear late.
const linkLimit = 5 * time.Second

// UpdateInterface makes the card with the MAC that the host names look as it says.
func (a *agent) UpdateInterface(ctx context.Context, req *pb.UpdateInterfaceRequest) (*protocols.Interface, error) {
	want := req.Interface
	if want == nil || want.Name == "" || len(want.Name) >= unix.IFNAMSIZ || strings.ContainsAny(want.Name, "/ \x00") {
		return nil, invalid("interface name %q", want.GetName())
	}
	mac, err := net.ParseMAC(want.HwAddr)
	if err != nil {
		return nil, invalid("interface address: %v", err)
	}
	addrs, err := parseAddresses(want.IPAddresses)
	if err != nil {
		return nil, err
	}
	link, err := waitForLink(ctx, mac)
	if err != nil {
		return nil, err
	}
	if link.Attrs().Name != want.Name {
		if err := netlink.LinkSetDown(link); err != nil {
			return nil, fmt.Errorf("bring %s down: %w", link.Attrs().Name, err)
		}
		if err := netlink.LinkSetName(link, want.Name); err != nil {
			return nil, fmt.Errorf("rename %s to %s: %w", link.Attrs().Name, want.Name, err)
		}
	}
	if want.Mtu > 0 && int(want.Mtu) != link.Attrs().MTU {
		if err := netlink.LinkSetMTU(link, int(want.Mtu)); err != nil {
			return nil, fmt.Errorf("set MTU %d of %s: %w", want.Mtu, want.Name, err)
		}
	}
	if want.RawFlags&unix.IFF_NOARP != 0 {
		if err := netlink.LinkSetARPOff(link); err != nil {
			return nil, fmt.Errorf("turn ARP of %s off: %w", want.Name, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("bring %s up: %w", want.Name, err)
	}
	if err := replaceAddresses(link, addrs); err != nil {
		return nil, fmt.Errorf("set addresses of %s: %w", want.Name, err)
	}
	return want, nil
}

func parseAddresses(list []*protocols.IPAddress) ([]*netlink.Addr, error) {
	var addrs []*netlink.Addr
	for _, ip := range list {
		addr, err := netlink.ParseAddr(ip.GetAddress() + "/" + ip.GetMask())
		if err != nil {
			return nil, invalid("address %q with mask %q", ip.GetAddress(), ip.GetMask())
		}
		if addr.IP.To4() == nil {
			// Nobody else has it, and a tentative address would refuse connections for a second.
			addr.Flags = unix.IFA_F_NODAD
		}
		addrs = append(addrs, addr)
	}
	return addrs, nil
}

func waitForLink(ctx context.Context, mac net.HardwareAddr) (netlink.Link, error) {
	ctx, cancel := context.WithTimeout(ctx, linkLimit)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		links, err := netlink.LinkList()
		if err != nil {
			return nil, fmt.Errorf("list interfaces: %w", err)
		}
		for _, l := range links {
			if l.Attrs().HardwareAddr.String() == mac.String() {
				return l, nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("no network card has the address %s: %w", mac, errdefs.ErrNotFound)
		}
	}
}

// replaceAddresses gives link exactly the addresses in want, and leaves the kernel's link-local one.
func replaceAddresses(link netlink.Link, want []*netlink.Addr) error {
	have, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, h := range have {
		keep := h.IP.IsLinkLocalUnicast()
		for _, w := range want {
			keep = keep || h.Equal(*w)
		}
		if !keep {
			if err := netlink.AddrDel(link, &h); err != nil {
				return err
			}
		}
	}
	for _, w := range want {
		if err := netlink.AddrReplace(link, w); err != nil {
			return fmt.Errorf("%s: %w", w.IPNet, err)
		}
	}
	return nil
}

// UpdateRoutes adds or replaces routes: those that lead straight to a network first, since the
// others' gateways are found by them.
func (a *agent) UpdateRoutes(_ context.Context, req *pb.UpdateRoutesRequest) (*pb.Routes, error) {
	for _, gateways := range []bool{false, true} {
		for _, r := range req.GetRoutes().GetRoutes() {
			if (r.GetGateway() != "") != gateways {
				continue
			}
			route, err := parseRoute(r)
			if err != nil {
				return nil, err
			}
			link, err := netlink.LinkByName(r.Device)
			if err != nil {
				return nil, fmt.Errorf("route to %q: interface %q: %w: %w", r.Dest, r.Device, err, errdefs.ErrNotFound)
			}
			route.LinkIndex = link.Attrs().Index
			if err := netlink.RouteReplace(route); err != nil {
				return nil, fmt.Errorf("set route to %q by %q on %s: %w", r.Dest, r.Gateway, r.Device, err)
			}
		}
	}
	return a.ListRoutes(context.Background(), nil)
}

// parseRoute translates all of a route but its interface.
func parseRoute(r *protocols.Route) (*netlink.Route, error) {
	route := &netlink.Route{
		Scope: netlink.Scope(r.GetScope()),
		Flags: int(r.GetFlags()) & unix.RTNH_F_ONLINK,
		MTU:   int(r.GetMtu()),
	}
	dest := r.GetDest()
	if dest == "" {
		dest = "0.0.0.0/0"
		if r.GetFamily() == protocols.IPFamily_v6 {
			dest = "::/0"
		}
	}
	_, dst, err := net.ParseCIDR(dest)
	if err != nil {
		return nil, invalid("route destination %q", dest)
	}
	route.Dst = dst
	if r.GetGateway() != "" {
		if route.Gw = net.ParseIP(r.Gateway); route.Gw == nil {
			return nil, invalid("route gateway %q", r.Gateway)
		}
	}
	if r.GetSource() != "" {
		if route.Src = net.ParseIP(r.Source); route.Src == nil {
			return nil, invalid("route source %q", r.Source)
		}
	}
	return route, nil
}

// ListInterfaces returns the network cards and their addresses.
func (a *agent) ListInterfaces(context.Context, *pb.ListInterfacesRequest) (*pb.Interfaces, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	result := &pb.Interfaces{}
	for _, l := range links {
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
		}
		i := &protocols.Interface{
			Device: l.Attrs().Name,
			Name:   l.Attrs().Name,
			Mtu:    uint64(l.Attrs().MTU),
			HwAddr: l.Attrs().HardwareAddr.String(),
			Type:   l.Type(),
		}
		for _, addr := range addrs {
			ones, _ := addr.Mask.Size()
			i.IPAddresses = append(i.IPAddresses, &protocols.IPAddress{
				Family: family(addr.IP), Address: addr.IP.String(), Mask: strconv.Itoa(ones),
			})
		}
		result.Interfaces = append(result.Interfaces, i)
	}
	return result, nil
}

// ListRoutes returns the main table's routes.
func (a *agent) ListRoutes(context.Context, *pb.ListRoutesRequest) (*pb.Routes, error) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	result := &pb.Routes{}
	for _, r := range routes {
		link, err := netlink.LinkByIndex(r.LinkIndex)
		if err != nil {
			continue // its card is gone, and it with it
		}
		p := &protocols.Route{
			Device: link.Attrs().Name, Scope: uint32(r.Scope), Flags: uint32(r.Flags), Mtu: uint32(r.MTU),
		}
		if r.Dst != nil {
			p.Dest, p.Family = r.Dst.String(), family(r.Dst.IP)
		}
		if r.Gw != nil {
			p.Gateway, p.Family = r.Gw.String(), family(r.Gw)
		}
		if r.Src != nil {
			p.Source = r.Src.String()
		}
		result.Routes = append(result.Routes, p)
	}
	return result, nil
}

func family(ip net.IP) protocols.IPFamily {
	if ip.To4() == nil {
		return protocols.IPFamily_v6
	}
	return protocols.IPFamily_v4
}

// AddARPNeighbors adds or replaces entries of the neighbour table.
func (a *agent) AddARPNeighbors(_ context.Context, req *pb.AddARPNeighborsRequest) (*emptypb.Empty, error) {
	for _, n := range req.GetNeighbors().GetARPNeighbors() {
		ip := net.ParseIP(n.GetToIPAddress().GetAddress())
		if ip == nil {
			return nil, invalid("neighbour address %q", n.GetToIPAddress().GetAddress())
		}
		mac, err := net.ParseMAC(n.GetLladdr())
		if err != nil {
			return nil, invalid("neighbour %s: %v", ip, err)
		}
		link, err := netlink.LinkByName(n.Device)
		if err != nil {
			return nil, fmt.Errorf("neighbour %s: interface %q: %w: %w", ip, n.Device, err, errdefs.ErrNotFound)
		}
		state := int(n.State)
		if state == 0 {
			state = netlink.NUD_PERMANENT
		}
		err = netlink.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, State: state, Flags: int(n.Flags), IP: ip, HardwareAddr: mac,
		})
		if err != nil {
			return nil, fmt.Errorf("set neighbour %s: %w", ip, err)
		}
	}
	return &emptypb.Empty{}, nil
}

// networkStats returns what each network card carried.
func networkStats() ([]*pb.NetworkStats, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var stats []*pb.NetworkStats
	for _, l := range links {
		s := l.Attrs().Statistics
		if s == nil || l.Attrs().Flags&net.FlagLoopback != 0 {
			continue
		}
		stats = append(stats, &pb.NetworkStats{
			Name:    l.Attrs().Name,
			RxBytes: s.RxBytes, RxPackets: s.RxPackets, RxErrors: s.RxErrors, RxDropped: s.RxDropped,
			TxBytes: s.TxBytes, TxPackets: s.TxPackets, TxErrors: s.TxErrors, TxDropped: s.TxDropped,
		})
	}
	return stats, nil
}
