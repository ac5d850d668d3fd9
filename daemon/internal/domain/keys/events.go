package keys

import (
	"strconv"
	"strings"
	"time"

	"github.com/msbd/msbd/api/audit"
)

// everything stands for all namespaces or all scopes in the audit log. No namespace or scope can have this name.
const everything = "*"

func createEvent(r Record) audit.Event {
	detail := map[string]string{"namespaces": everything, "scopes": everything, "expires": "never"}
	if r.Name != "" {
		detail["name"] = r.Name
	}
	if len(r.Namespaces) > 0 {
		detail["namespaces"] = strings.Join(r.Namespaces, ",")
	}
	if len(r.Scopes) > 0 {
		detail["scopes"] = joinScopes(r.Scopes, ",")
	}
	if !r.ExpiresAt.IsZero() {
		detail["expires"] = r.ExpiresAt.Format(time.RFC3339)
	}
	return audit.Event{Action: audit.KeyCreate, Actor: audit.ActorUID(r.CreatedBy), Target: r.ID, Detail: detail}
}

func revokeEvent(r Record, by uint32) audit.Event { return keyEvent(audit.KeyRevoke, r, by) }

func pruneEvent(r Record, by uint32) audit.Event { return keyEvent(audit.KeyPrune, r, by) }

func rotateEvent(old Record, by uint32) audit.Event {
	e := keyEvent(audit.KeyRotate, old, by)
	if e.Detail == nil {
		e.Detail = make(map[string]string)
	}
	e.Detail["replaced_by"] = old.ReplacedBy
	e.Detail["accepted_until"] = old.Until().Format(time.RFC3339)
	return e
}

func keyEvent(action string, r Record, by uint32) audit.Event {
	e := audit.Event{Action: action, Actor: audit.ActorUID(by), Target: r.ID}
	if r.Name != "" {
		e.Detail = map[string]string{"name": r.Name}
	}
	return e
}

// invalidateEvent returns the event for the keys that became invalid because ring replaced their signing key. live is the
// number of these keys.
func invalidateEvent(actor string, ring *keyring, live int) audit.Event {
	return audit.Event{Action: audit.KeysInvalid, Actor: actor, Target: ring.keyID, Detail: map[string]string{"count": strconv.Itoa(live)}}
}

// signingKeyEvent returns the event for ring becoming the signing key. action says why.
func signingKeyEvent(action, actor string, ring *keyring) audit.Event {
	return audit.Event{Action: action, Actor: actor, Target: ring.keyID}
}
