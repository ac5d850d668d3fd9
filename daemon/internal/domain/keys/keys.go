// Package keys issues and verifies API keys.
//
// A key consists of a record and a signed token. The token is shown once, when the key is created, and is never
// stored. The records are kept in the Store, and all of them are also held in memory. A token is accepted only if
// this server's signing key signed it and its record is live. Therefore neither a stolen signing key nor a record
// alone is enough to get access.
//
// A Verifier checks tokens, and an Issuer creates and changes keys. They share a keySet, which holds every record
// and, for each key in use, a session that makes further requests with the key cheap. The Store first makes a
// change durable, together with its entries in the audit log; then the change takes effect in memory. There is one
// exception: when the signing key is replaced, the old keys are refused before the Store has marked them as revoked.
//
// The HTTP gateway uses the Verifier and the admin API uses the Issuer. The package does not depend on HTTP, gRPC
// or a database.
package keys

import (
	"net/netip"
	"time"

	"github.com/msbd/msbd/api/audit"
)

// Scope is a permission that a key may be limited to.
type Scope string

// The scopes. The gateway's method table assigns one to each method.
const (
	ScopeStart   Scope = "sandbox:start"  // start sandboxes
	ScopeStop    Scope = "sandbox:stop"   // stop sandboxes
	ScopeExec    Scope = "sandbox:exec"   // run code and commands in sandboxes
	ScopeFiles   Scope = "sandbox:files"  // read and write the files of sandboxes
	ScopeRead    Scope = "sandbox:read"   // read which sandboxes exist, their state and their resource usage
	ScopeMetrics Scope = "server:metrics" // read the metrics of the entire server
)

// Scopes lists all scopes.
var Scopes = []Scope{ScopeStart, ScopeStop, ScopeExec, ScopeFiles, ScopeRead, ScopeMetrics}

// Record is what the server stores about a key. It is authoritative: a token whose claims differ from its record
// is refused.
type Record struct {
	// ID is 128 random bits in hex. It is the jti claim of the token.
	ID string `json:"id"`
	// Name is a name for people to use. It may be empty. It is unique among the keys that are live and have not
	// been rotated.
	Name string `json:"name,omitempty"`
	// Namespaces lists the tenant namespaces that the key is limited to, sorted. Empty means all namespaces.
	Namespaces []string `json:"namespaces,omitempty"`
	// Scopes lists what the key may do, sorted. Empty means everything.
	Scopes []Scope `json:"scopes,omitempty"`
	// CreatedAt is in UTC and truncated to milliseconds, like all times in a Record.
	CreatedAt time.Time `json:"created_at"`
	// CreatedBy is the uid of the local user who created the key.
	CreatedBy uint32 `json:"created_by"`
	// Life is the expiry as it was requested, such as 3mo. A key that replaces this one gets the same by default.
	Life string `json:"life,omitempty"`
	// ExpiresAt is the first moment at which the key is refused because it has expired. Zero means never.
	ExpiresAt time.Time `json:"expires_at,omitzero"`
	// SigningKeyID identifies the signing key that signed the token.
	SigningKeyID string `json:"signing_key_id"`
	// RevokedAt is the first moment at which the key is refused because of Revocation. Zero means that it was
	// not revoked. During the grace period of a rotation, RevokedAt is in the future.
	RevokedAt time.Time `json:"revoked_at,omitzero"`
	// Revocation is how the key was revoked. It is empty if the key was not revoked.
	Revocation Revocation `json:"revocation,omitempty"`
	// ReplacedBy is the id of the key that replaced this one in a rotation.
	ReplacedBy string `json:"replaced_by,omitempty"`
}

// Revocation is the way in which a key was revoked.
type Revocation string

const (
	ByHand     Revocation = "revoked" // an administrator revoked this key
	ByRotation Revocation = "rotated" // another key replaced this key
	ByReset    Revocation = "reset"   // the signing key was replaced, which revokes all of its keys
	// Pruned marks what Prune leaves of the record of a revoked key. See Record.tombstone.
	Pruned Revocation = "pruned"
)

// State is the state of a key. Only a Live key is accepted.
type State int

// The states. A key that is both expired and revoked is Revoked.
const (
	Live State = iota + 1
	Expired
	Revoked
)

// StateAt returns the state of the key at the time now.
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

// Until returns the first moment at which the key is refused. Zero means never.
func (r Record) Until() time.Time {
	if r.ExpiresAt.IsZero() || !r.RevokedAt.IsZero() && r.RevokedAt.Before(r.ExpiresAt) {
		return r.RevokedAt
	}
	return r.ExpiresAt
}

// reached reports whether now is at or after the time at. It returns false if at is zero.
func reached(at, now time.Time) bool { return !at.IsZero() && !now.Before(at) }

// Usage describes how a key has been used.
type Usage struct {
	// Requests is the number of requests that the key has authenticated.
	Requests uint64 `json:"requests"`
	// LastUsedAt is zero if the key has never been used.
	LastUsedAt   time.Time  `json:"last_used_at,omitzero"`
	LastUsedFrom netip.Addr `json:"last_used_from,omitzero"`
}

// Key is a record together with the usage of its key.
type Key struct {
	Record
	Usage
}

// Store stores records. When a method has returned nil, its change is durable.
type Store interface {
	// LoadKeys returns everything that is stored about keys.
	LoadKeys() (Saved, error)
	// CommitKeys makes a change and writes its events to the audit log. It does all of this or nothing.
	CommitKeys(Change) error
	// SaveUsage replaces the usage of the given keys, by id. It sets Saved.Latest to latest if that is later.
	// It ignores keys that are not in the store.
	SaveUsage(usage map[string]Usage, latest time.Time) error
}

// Saved is what a Store holds about keys.
type Saved struct {
	// Records includes the records of expired, revoked and pruned keys.
	Records []Record
	// Usage is the usage of the keys, by id.
	Usage map[string]Usage
	// Latest is the latest time that the server has used and that is confirmed. See Issuer.ClockBehind.
	Latest time.Time
}

// Change is a set of changes that a Store makes together or not at all.
type Change struct {
	// Delete holds the ids of records to remove. Their usage is removed with them.
	Delete []string
	// Put holds records to add, after the removals. A record replaces the stored record with the same id.
	Put []Record
	// Clock, if not zero, replaces Saved.Latest, even by an earlier time.
	Clock time.Time
	// Events are appended to the audit log in this order.
	Events []audit.Event
}

// Counts is the number of keys in each State.
type Counts struct {
	Live, Expired, Revoked int
}

// SigningKey is the public information about the key that signs tokens.
type SigningKey struct {
	// InstanceID identifies this server in the tokens that it issues. A reset does not change it.
	InstanceID string
	ID         string
	CreatedAt  time.Time
}
