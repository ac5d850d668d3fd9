package gateway

import (
	"net/http"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/token"
)

// errNoKey is the one answer to a missing, malformed, expired, revoked or unknown key.
var errNoKey = &rpc.Error{
	Code:    rpc.CodeUnauthenticated,
	Message: "missing or invalid API key; send one in the header Authorization: Bearer KEY (the server's administrator makes them with: msb server keygen)",
}

// developer is everybody in dev mode.
var developer = token.Principal{KeyID: "dev"}

// authenticate says whose request it is. Its error is for the log: refuse tells the client no cause.
func (g *Gateway) authenticate(r *http.Request) (token.Principal, error) {
	if g.Dev {
		return developer, nil
	}
	key := credential(r.Header)
	if key == "" {
		return token.Principal{}, errNoKey
	}
	from := source(r.RemoteAddr)
	if !g.tries.allowed(from, key) {
		return token.Principal{}, errTooManyTries
	}
	p, err := g.Verifier.Verify(key)
	switch {
	case err == nil:
		g.tries.succeeded(key)
	case errdefs.IsUnauthorized(err):
		g.tries.failed(from)
	}
	return p, err
}

// credential is the API key in the headers, with or without its scheme. Proxy-Authorization wins
// when it is present, even when it is of no use: which header counts must not depend on what is in
// it. The same holds for a header that is there twice.
func credential(h http.Header) string {
	values := h["Proxy-Authorization"]
	if values == nil {
		values = h["Authorization"]
	}
	if len(values) != 1 {
		return ""
	}
	scheme, key, found := strings.Cut(values[0], " ")
	if !found {
		return scheme
	}
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimLeft(key, " ")
}
