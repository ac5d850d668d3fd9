package keys

import (
	"context"
	"slices"
)

// Principal is who a request speaks for. The zero Principal is nobody and is allowed nothing.
type Principal struct {
	// KeyID is the id of the key: fit for logs.
	KeyID string
	// Namespaces are the tenant namespaces that it is limited to; empty means every one. Read only.
	Namespaces []string
	// Scopes is what it may do; empty means everything. Read only.
	Scopes []Scope
	// alive ends, with a cause, when the key is refused; nil never ends.
	alive context.Context
}

// Allows reports whether the principal may act in a tenant namespace.
func (p Principal) Allows(namespace string) bool {
	return p.KeyID != "" && (len(p.Namespaces) == 0 || slices.Contains(p.Namespaces, namespace))
}

// Has reports whether the principal may do what needs a scope.
func (p Principal) Has(s Scope) bool {
	return p.KeyID != "" && (len(p.Scopes) == 0 || slices.Contains(p.Scopes, s))
}

// Bind returns a context that ends at the latest when the key does: when it expires, is revoked or its
// signing key is replaced. The cause is then errdefs.ErrUnauthenticated. If that happened since the
// principal was verified, the context has ended already.
func (p Principal) Bind(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	if p.alive == nil {
		return ctx, func() { cancel(nil) }
	}
	cut := func() { cancel(context.Cause(p.alive)) }
	if p.alive.Err() != nil {
		cut()
	}
	stop := context.AfterFunc(p.alive, cut)
	return ctx, func() {
		stop()
		cancel(nil)
	}
}
