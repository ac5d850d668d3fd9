package keys

import (
	"context"
	"slices"
)

// Principal is the identity and the permissions of an authenticated request. The zero Principal has no permissions.
type Principal struct {
	// KeyID is the id of the key. It is not secret and may be logged.
	KeyID string
	// Namespaces lists the tenant namespaces that the principal is limited to. Empty means all namespaces. It must
	// not be modified.
	Namespaces []string
	// Scopes lists what the principal may do. Empty means everything. It must not be modified.
	Scopes []Scope
	// alive is canceled, with a cause, when the key is refused. If alive is nil, that never happens.
	alive context.Context
}

// Allows reports whether the principal may act in a tenant namespace.
func (p Principal) Allows(namespace string) bool {
	return p.KeyID != "" && (len(p.Namespaces) == 0 || slices.Contains(p.Namespaces, namespace))
}

// Has reports whether the principal has the scope s.
func (p Principal) Has(s Scope) bool {
	return p.KeyID != "" && (len(p.Scopes) == 0 || slices.Contains(p.Scopes, s))
}

// Bind returns a copy of ctx that is also canceled when the key expires or is revoked, or when its signing key is
// replaced. The cause is then errdefs.ErrUnauthenticated. If this has happened since the principal was verified, Bind
// returns a context that is already canceled.
func (p Principal) Bind(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	if p.alive == nil {
		return ctx, func() { cancel(nil) }
	}
	refuse := func() { cancel(context.Cause(p.alive)) }
	if p.alive.Err() != nil {
		refuse() // at once, because AfterFunc calls it in another goroutine
	}
	stop := context.AfterFunc(p.alive, refuse)
	return ctx, func() {
		stop()
		cancel(nil)
	}
}
