package http

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/net/http/httpguts"

	"github.com/msbd/msbd/api/rpc"
)

// checkHandshake checks that a request asks for a WebSocket, in version 13 of the protocol, which is the only one in use. The
// library of the endpoint checks the rest.
func checkHandshake(r *http.Request) error {
	if r.ProtoMajor != 1 {
		return errOnlyHTTP1
	}
	if httpguts.HeaderValuesContainsToken(r.Header["Connection"], "Upgrade") &&
		httpguts.HeaderValuesContainsToken(r.Header["Upgrade"], "websocket") &&
		r.Header.Get("Sec-WebSocket-Version") == "13" {
		return nil
	}
	refusal := newRefusal(http.StatusUpgradeRequired, "this path is a WebSocket; connect with a WebSocket client that supports version 13 of the protocol")
	refusal.Header = http.Header{"Upgrade": {"websocket"}, "Connection": {"Upgrade"}, "Sec-Websocket-Version": {"13"}}
	return refusal
}

// errOnlyHTTP1 is the error for a connection that cannot be hijacked.
var errOnlyHTTP1 = fmt.Errorf("this path works only over HTTP/1.1: %w", errdefs.ErrInvalidArgument)

// handshakeKey returns the API key in the subprotocols that the client of a WebSocket offers, or "" unless there is exactly
// one.
func handshakeKey(h http.Header) (key string) {
	for _, value := range h["Sec-Websocket-Protocol"] {
		for protocol := range strings.SplitSeq(value, ",") {
			offered, ok := strings.CutPrefix(strings.TrimSpace(protocol), rpc.KeyProtocolPrefix)
			if ok && key != "" {
				return ""
			}
			if ok {
				key = offered
			}
		}
	}
	return key
}
