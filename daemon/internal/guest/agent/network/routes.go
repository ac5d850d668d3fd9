package network

import (
	"context"
	"fmt"
	"net"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

// UpdateRoutes adds or replaces routes and returns all routes. It adds the routes without a gateway first, because the
// kernel uses them to reach the gateways of the other routes.
func UpdateRoutes(ctx context.Context, routes []*protocols.Route) (*pb.Routes, error) {
	var direct, byGateway []*netlink.Route
	for _, r := range routes {
		if err := ctx.Err(); err != nil {
			return nil, err // the caller has given up
		}
		route, err := parseRoute(r)
		if err != nil {
			return nil, err
		}
		if route.Dst.IP.To4() == nil && !hasIPv6() {
			continue
		}
		link, err := netlink.LinkByName(r.Device)
		if err != nil {
			return nil, fmt.Errorf("route to %q: interface %q: %w: %w", r.Dest, r.Device, err, errdefs.ErrNotFound)
		}
		route.LinkIndex = link.Attrs().Index
		if route.Gw == nil {
			direct = append(direct, route)
		} else {
			byGateway = append(byGateway, route)
		}
	}
	for _, route := range append(direct, byGateway...) {
		if err := netlink.RouteReplace(route); err != nil {
			return nil, fmt.Errorf("set route %s: %w", route, err)
		}
	}
	return Routes()
}

// parseRoute translates r, except for its interface.
func parseRoute(r *protocols.Route) (*netlink.Route, error) {
	route := &netlink.Route{
		Scope: netlink.Scope(r.GetScope()),
		Flags: int(r.GetFlags()) & unix.RTNH_F_ONLINK,
		MTU:   int(r.GetMtu()),
	}
	var err error
	if route.Gw, err = parseOptionalIP(r.GetGateway()); err != nil {
		return nil, refusal.Invalid("route gateway: %v", err)
	}
	if route.Src, err = parseOptionalIP(r.GetSource()); err != nil {
		return nil, refusal.Invalid("route source: %v", err)
	}
	dest := r.GetDest()
	switch {
	case dest != "":
	case r.GetFamily() == protocols.IPFamily_v6 || route.Gw != nil && route.Gw.To4() == nil:
		dest = "::/0"
	default:
		dest = "0.0.0.0/0"
	}
	if _, route.Dst, err = net.ParseCIDR(dest); err != nil {
		ip, err := parseOptionalIP(dest)
		if err != nil {
			return nil, refusal.Invalid("route destination: %v", err)
		}
		route.Dst = netlink.NewIPNet(ip) // a single host
	}
	return route, nil
}

// parseOptionalIP parses text as an IP address and ignores a prefix length after it. It returns nil if text is empty.
func parseOptionalIP(text string) (net.IP, error) {
	if text == "" {
		return nil, nil
	}
	address, _, _ := strings.Cut(text, "/")
	ip := net.ParseIP(address)
	if ip == nil {
		return nil, fmt.Errorf("%q is not an IP address", text)
	}
	return ip, nil
}

// Routes returns the routes in the main routing table.
func Routes() (*pb.Routes, error) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	result := &pb.Routes{}
	for _, r := range routes {
		link, err := netlink.LinkByIndex(r.LinkIndex)
		if err != nil {
			continue // the interface was removed, and the route with it
		}
		p := &protocols.Route{
			Device: link.Attrs().Name, Scope: uint32(r.Scope), Flags: uint32(r.Flags), Mtu: uint32(r.MTU),
		}
		if r.Dst != nil {
			p.Family = family(r.Dst.IP)
			if length, _ := r.Dst.Mask.Size(); length > 0 { // otherwise it is a default route
				p.Dest = r.Dst.String()
			}
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
