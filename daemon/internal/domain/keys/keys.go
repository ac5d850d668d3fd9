// Package keys is the domain of API keys: what a key is, how it is issued, and how the token that
// a client presents is verified.
//
// A key is a record plus a signed token. The token is shown once and never kept; the record lives in
// the Store and, all of them, in memory. A token is good only if this server signed it and its record
// is live: a stolen signing key alone mints nothing, and a record alone opens nothing.
//
// A Verifier checks tokens, an Issuer creates and changes keys, and both share a keySet: every record and,
// for the keys that are in use, the session that makes their next request cheap. A change is first made
// durable by the Store, with its lines in the audit log, and then effective in memory; only the refusal of
// all keys of a signing key does not wait for the Store.
//
// The gateway enters through the Verifier, the admin socket through the Issuer. The package knows no
// HTTP, no gRPC and no database.
package keys

import (
	"net/netip"
	"time"

	"github.com/msbd/msbd/api/audit"
)

// Scope is a permission that a key may be limited to.
type Scope string

// The scopes. The gateway's table of methods names one for each method.
const (
	ScopeStart   Scope = "sandbox:start"  // start sandboxes
	ScopeStop    Scope = "sandbox:stop"   // stop sandboxes
	ScopeExec    Scope = "sandbox:exec"   // run code and commands in sandboxes
	ScopeRead    Scope = "sandbox:read"   // measure sandboxes
	ScopeMetrics Scope = "server:metrics" // read the metrics of the whole server
)

// Scopes is every scope there is.
var Scopes = []Scope{ScopeStart, ScopeStop, ScopeExec, ScopeRead, ScopeMetrics}

// Record is what is kept of a key. It is authoritative: a token whose claims differ from its record
// is refused.
type Record struct {
	// ID is 128 random bits in hex; the token's jti.
	ID string `json:"id"`
	// Name is what people call the key; may be empty. Of the keys that are live and not being replaced,
	// no two have the same.
	Name string `json:"name,omitempty"`
	// Namespaces are the tenant namespaces that the key is limited to, sorted; empty means every one.
	Namespaces []string `json:"namespaces,omitempty"`
	// Scopes is what the key may do, sorted; empty means everything.
	Scopes []Scope `json:"scopes,omitempty"`
	// CreatedAt is in UTC, as are the other times, in whole milliseconds.
	CreatedAt time.Time `json:"created_at"`
	// CreatedBy is the uid of the local user who asked for the key.
	CreatedBy uint32 `json:"created_by"`
	// Life is the expiry as it was asked for, such as 3mo: that of the key which replaces this one.
	Life string `json:"life,omitempty"`
	// ExpiresAt is the first moment at which the key is refused; zero means never.
	ExpiresAt time.Time `json:"expires_at,omitzero"`
	// SigningKeyID names the signing key of the token.
	SigningKeyID string `json:"signing_key_id"`
	// RevokedAt is the first moment at which the key is refused because of Revocation; zero means that
	// it was not revoked. During the grace period of a rotation it lies in the future.
	RevokedAt time.Time `json:"revoked_at,omitzero"`
	// Revocation is how the key was revoked, if it was.
	Revocation Revocation `json:"revocation,omitempty"`
	// ReplacedBy is the id of the key that a rotation made in place of this one.
	ReplacedBy string `json:"replaced_by,omitempty"`
}

// Revocation is a way in which a key came to be refused.
type Revocation string

// The ways: by itself, replaced by another key, with all keys of its signing key.
const (
	ByHand     Revocation = "revoked"
	ByRotation Revocation = "rotated"
	ByReset    Revocation = "reset"
)

// State is whether a key is accepted.
type State int

// The states. An expired key that was revoked is revoked.
const (
	Live State = iota + 1
	Expired
	Revoked
)

// StateAt says how the key is at now.
func (r Record) StateAt(now time.Time) State {
	switch {
	case reached(r.RevokedAt, now):
		return Revoked
	case reached(r.ExpiresAt, now):
		return Expired
	default:
		return Live
	}
}

// Until is the first moment at which the key is refused; zero means never.
func (r Record) Until() time.Time {
	if r.ExpiresAt.IsZero() || !r.RevokedAt.IsZero() && r.RevokedAt.Before(r.ExpiresAt) {
		return r.RevokedAt
	}
	return r.ExpiresAt
}

// reached reports whether a moment has come; the zero moment never comes.
func reached(at, now time.Time) bool { return !at.IsZero() && !now.Before(at) }

// Usage is how a key was used.
type Usage struct {
	// Requests counts the requests that the key authenticated.
	Requests uint64 `json:"requests"`
	// LastUsedAt is zero for a key that was never used.
	LastUsedAt   time.Time  `json:"last_used_at,omitzero"`
	LastUsedFrom netip.Addr `json:"last_used_from,omitzero"`
}

// Key is a record with its use so far.
type Key struct {
	Record
	Usage
}

// Store keeps records. A method that returned nil has made its change durable.
type Store interface {
	// LoadKeys returns everything.
	LoadKeys() (Saved, error)
	// CommitKeys makes a change and logs its events, all of it or nothing.
	CommitKeys(Change) error
	// SaveUsage replaces the usage of these keys, by id, and moves the clock of Saved forward to latest.
	// A key that is not in the store is passed over.
	SaveUsage(usage map[string]Usage, latest time.Time) error
}

// Saved is what a Store holds of keys.
type Saved struct {
	// Records holds dead keys, too.
	Records []Record
	Usage   map[string]Usage
	// Latest is the latest time that the server is known to have seen.
	Latest time.Time
}

// Change is one step.
type Change struct {
	// Put adds records or replaces those of the same id.
	Put []Record
	// Delete is the ids of records to remove, with their usage.
	Delete []string
	// Clock, if it is not zero, replaces the latest time that the server is known to have seen.
	Clock time.Time
	// Events go to the audit log, in this order.
	Events []audit.Event
}

// Counts says how many keys there are in each State.
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
