// Package token is the domain of API keys: what a key is, how it is issued, and whom a token that a
// client presents speaks for.
//
// A key is a record plus a signed token. The token is shown once and never kept; the record lives in
// the Store and, all of them, in memory. A token is good only if this server signed it and its record
// is live: a stolen signing key alone mints nothing, and a record alone opens nothing.
//
// The gateway enters through the Verifier, the admin socket through the Issuer. The package knows no
// HTTP, no gRPC and no database.
package token

import "time"

// Record is what is kept of a key. It is authoritative: a token whose claims differ from its record
// is refused.
type Record struct {
	// ID is 128 random bits in hex; the token's jti.
	ID string `json:"id"`
	// Namespace is the tenant namespace that the key is limited to; empty means every one.
	Namespace string `json:"namespace,omitempty"`
	// Scopes is what the key may do; nil means everything.
	Scopes []string `json:"scopes,omitempty"`
	// CreatedAt is in UTC, as are the other times, in whole milliseconds.
	CreatedAt time.Time `json:"created_at"`
	// CreatedBy is the uid of the local user who asked for the key.
	CreatedBy uint32 `json:"created_by"`
	// ExpiresAt is the first moment at which the key is refused; zero means never.
	ExpiresAt time.Time `json:"expires_at,omitzero"`
	// SigningKeyID names the signing key of the token.
	SigningKeyID string `json:"signing_key_id"`
	// RevokedAt is when the key was revoked or its signing key replaced; zero means it was not.
	RevokedAt time.Time `json:"revoked_at,omitzero"`
}

// Revoked says whether the key was revoked, by itself or by a reset.
func (r Record) Revoked() bool { return !r.RevokedAt.IsZero() }

// Expired says whether the key is refused at now because of its age.
func (r Record) Expired(now time.Time) bool { return expired(r.ExpiresAt, now) }

func expired(at, now time.Time) bool { return !at.IsZero() && !now.Before(at) }

// Store keeps records. A method that returned nil has made its change durable.
type Store interface {
	// AddKey keeps a new record. An id that is taken is errdefs.ErrAlreadyExists.
	AddKey(Record) error
	// Keys returns every record, dead ones too.
	Keys() ([]Record, error)
	// RevokeKeysNotSignedBy marks each record of another signing key that is not revoked yet, all in
	// one step.
	RevokeKeysNotSignedBy(signingKeyID string, at time.Time) error
}

// Principal is who a request speaks for. The zero Principal is nobody and is allowed nothing.
type Principal struct {
	// KeyID is the id of the key: fit for logs.
	KeyID string
	// Namespace is the tenant namespace that it is limited to; empty means every one.
	Namespace string
	// Scopes is what it may do; nil means everything. Read only: it is shared.
	Scopes []string
}

// Allows says whether the principal may act in a tenant namespace.
func (p Principal) Allows(namespace string) bool {
	return p.KeyID != "" && (p.Namespace == "" || p.Namespace == namespace)
}

// Counts says how many keys there are of each kind. An expired key that was revoked is revoked.
type Counts struct {
	Live, Expired, Revoked int
}

// SigningKey is what may be known of the key that signs tokens.
type SigningKey struct {
	// InstanceID names this server in the tokens that it issues; it outlives resets.
	InstanceID string
	ID         string
	CreatedAt  time.Time
}
