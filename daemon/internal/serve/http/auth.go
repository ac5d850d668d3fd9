package http

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// errNoKey is the one answer to a missing, malformed, expired, revoked or unknown key.
var errNoKey = &rpc.Error{
	Code:    rpc.CodeUnauthenticated,
	Message: "missing or invalid API key; send one in the header Authorization: Bearer KEY (the server's administrator makes them with: msb server keygen)",
}

// developer is everybody in dev mode.
var developer = keys.Principal{KeyID: "dev"}

// behindKey serves a route to those who have a key for it, in the bounds of that key and for as long as
// the key is accepted.
func (g *Gateway) behindKey(x *exchange, at route) answer {
	var err error
	if x.caller, err = g.authenticate(x); err != nil {
		return g.refuse(x, err)
	}
	if !g.inFlight.enter(x.caller.KeyID) {
		return g.refuse(x, fmt.Errorf("this key has %d requests in flight; wait for some to end: %w", maxInFlight, errdefs.ErrResourceExhausted))
	}
	defer g.inFlight.leave(x.caller.KeyID)
	x.bucket = g.rates.of(x.caller.KeyID)
	if wait := takeCall(x.bucket); wait > 0 {
		return g.refuse(x, &rpc.Error{
			Code:    rpc.CodeExhausted,
			Message: fmt.Sprintf("this key may make %g calls per second; wait %d s", g.RequestsPerSecond, wait),
			Data:    &rpc.ErrorData{RetryAfter: wait},
		})
	}
	if err := checkServerScope(x.caller, at.scope); err != nil {
		return g.refuse(x, err)
	}
	if x.r.Method == http.MethodPost {
		if refused, ok := g.readBody(x); !ok {
			return refused
		}
	}
	// Only now: a key that ended meanwhile, however long that took, has nothing begun.
	ctx, cancel := x.caller.Bind(x.r.Context())
	defer cancel()
	a := at.serve(ctx, x)
	// What a handler came to in spite of its end goes to nobody.
	if ended := context.Cause(ctx); errdefs.IsUnauthorized(ended) {
		return g.refuse(x, ended)
	}
	return a
}

// authenticate says whose request it is. Its error is for the log: refuse tells the client no cause.
func (g *Gateway) authenticate(x *exchange) (keys.Principal, error) {
	if g.Dev {
		return developer, nil
	}
	key := credential(x.r.Header)
	if key == "" {
		return keys.Principal{}, errNoKey
	}
	from := source(x.client)
	if !g.tries.allowed(from, key) {
		return keys.Principal{}, errTooManyTries
	}
	p, err := g.Verifier.Verify(key, x.client)
	switch {
	case err == nil:
		g.tries.succeeded(key)
	case errdefs.IsUnauthorized(err):
		g.tries.failed(from, key)
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
