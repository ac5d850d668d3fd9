package http

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// checkBrowser refuses what a web page may have made a browser send. Without keys, reaching the
// server is all that an attacker needs, and a browser on the same machine reaches it. Its error is
// errdefs.ErrPermissionDenied.
func (g *Gateway) checkBrowser(r *http.Request) error {
	// A name that was pointed at this machine by its owner passes every check of origin.
	if !isLocalHost(r.Host) {
		return fmt.Errorf("host %q: in dev mode the server answers to localhost and loopback addresses only: %w", r.Host, errdefs.ErrPermissionDenied)
	}
	for _, origin := range r.Header["Origin"] {
		if u, err := url.Parse(origin); err != nil || u.Host != r.Host {
			return fmt.Errorf("origin %q: in dev mode the server takes no requests from web pages: %w", origin, errdefs.ErrPermissionDenied)
		}
	}
	// same-origin is a page of this server, which has none; none is what somebody typed.
	for _, site := range r.Header["Sec-Fetch-Site"] {
		if site != "same-origin" && site != "none" {
			return fmt.Errorf("%s request: in dev mode the server takes no requests from web pages: %w", rpcerr.Shorten(site), errdefs.ErrPermissionDenied)
		}
	}
	if g.crossOrigin.Check(r) != nil {
		return fmt.Errorf("cross-origin request: in dev mode the server takes no requests from web pages: %w", errdefs.ErrPermissionDenied)
	}
	return nil
}

// isLocalHost reports whether a Host header can only mean this machine.
func isLocalHost(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = strings.TrimSuffix(strings.TrimPrefix(hostport, "["), "]")
	}
	return config.IsLoopback(host)
}
