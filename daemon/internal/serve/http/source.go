package http

import (
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// clientIP returns the address of the client that sent r. This is the remote address of the connection, unless that
// belongs to a trusted proxy. In this case it is the last address in X-Forwarded-For that is not a trusted proxy
// itself. The addresses before that one may be forged.
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

// containsAddr reports whether one of the networks contains addr.
func containsAddr(networks []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(addr) })
}

// remoteIP returns the IP address in a RemoteAddr, or the zero Addr if remoteAddr cannot be parsed.
func remoteIP(remoteAddr string) netip.Addr {
	ap, _ := netip.ParseAddrPort(remoteAddr)
	return ap.Addr().Unmap().WithZone("")
}

// sourceNet returns the network by which clients are limited, which a single client may control: the address itself for
// IPv4, the /64 for IPv6. For the zero Addr it returns the zero Prefix.
func sourceNet(addr netip.Addr) netip.Prefix {
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	p, _ := addr.Prefix(bits) // cannot fail, because bits fits the address
	return p
}
