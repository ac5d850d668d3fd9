package http

import (
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// clientIP is whose request it is: who made the connection or, if that is a proxy which the administrator
// trusts, whom that one names: the last hop of X-Forwarded-For that is no trusted proxy itself. What stands
// before that may be anybody's invention.
func (g *Gateway) clientIP(r *http.Request) netip.Addr {
	client := remoteIP(r.RemoteAddr)
	if !containsAddr(g.TrustedProxies, client) {
		return client
	}
	hops := strings.Split(strings.Join(r.Header["X-Forwarded-For"], ","), ",")
	for _, hop := range slices.Backward(hops) {
		addr, err := netip.ParseAddr(strings.TrimSpace(hop))
		if err != nil {
			break
		}
		if client = addr.Unmap().WithZone(""); !containsAddr(g.TrustedProxies, client) {
			break
		}
	}
	return client
}

func containsAddr(networks []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(addr) })
}

// remoteIP is the address in a RemoteAddr; the zero Addr if it cannot be read.
func remoteIP(remoteAddr string) netip.Addr {
	ap, _ := netip.ParseAddrPort(remoteAddr)
	return ap.Addr().Unmap().WithZone("")
}

// source is the network that one client has for itself: an IPv4 address, or an IPv6 /64. The zero
// Prefix stands for every address that cannot be read.
func sourceNet(addr netip.Addr) netip.Prefix {
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	p, _ := addr.Prefix(bits) // the bits fit the address, if it is one
	return p
}
