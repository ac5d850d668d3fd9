package http

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/sys/bounded"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// checkBrowser refuses requests that a web page may have made a browser send. In dev mode there are no keys, so an
// attacker only has to reach the server, and a browser on the same machine can reach it. The error is
// errdefs.ErrPermissionDenied.
func (g *Gateway) checkBrowser(r *http.Request) error {
	// DNS rebinding: if an attacker's name resolves to this machine, a page from that name counts as same-origin and
	// passes all the checks below.
	if !isLocalHost(r.Host) {
		return fmt.Errorf("host %q: in dev mode the server accepts only localhost and loopback addresses as host: %w", r.Host, errdefs.ErrPermissionDenied)
	}
	for _, origin := range r.Header["Origin"] {
		if u, err := url.Parse(origin); err != nil || u.Host != r.Host {
			return fmt.Errorf("origin %q: in dev mode the server accepts no requests from web pages: %w", origin, errdefs.ErrPermissionDenied)
		}
	}
	// "none" means that the user started the request, for example by typing the address. "same-origin" would be a page
	// of this server, which serves no pages.
	for _, site := range r.Header["Sec-Fetch-Site"] {
		if site != "same-origin" && site != "none" {
			return fmt.Errorf("%s request: in dev mode the server accepts no requests from web pages: %w", bounded.Short(site), errdefs.ErrPermissionDenied)
		}
	}
	if g.crossOrigin.Check(r) != nil {
		return fmt.Errorf("cross-origin request: in dev mode the server accepts no requests from web pages: %w", errdefs.ErrPermissionDenied)
	}
	return nil
}

// isLocalHost reports whether a Host header is localhost or a loopback address, with or without a port.
func isLocalHost(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = strings.TrimSuffix(strings.TrimPrefix(hostport, "["), "]")
	}
	return config.IsLoopback(host)
}
