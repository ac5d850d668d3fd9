package main

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

// keyRefHelp describes the KEY argument of all commands that take one.
const keyRefHelp = "KEY is the name of a key, its id, or an unambiguous prefix of its id with at least 4 characters."

// minIDPrefix is the minimum length of a prefix of an id that identifies a key; see keyRefHelp.
const minIDPrefix = 4

// keyInfo is a key in JSON. Its lists are never empty: ["*"] means all namespaces or all scopes. An empty list would look
// like a key that may do nothing.
type keyInfo struct {
	ID           string     `json:"id"`
	Name         string     `json:"name"`
	State        string     `json:"state"`
	Namespaces   []string   `json:"namespaces"`
	Scopes       []string   `json:"scopes"`
	CreatedAt    *time.Time `json:"created_at"`
	CreatedBy    userInfo   `json:"created_by"`
	ExpiresAt    *time.Time `json:"expires_at"`
	RevokedAt    *time.Time `json:"revoked_at"`
	Revocation   string     `json:"revocation,omitempty"`
	ReplacedBy   string     `json:"replaced_by,omitempty"`
	SigningKeyID string     `json:"signing_key_id"`
	Requests     uint64     `json:"requests"`
	LastUsedAt   *time.Time `json:"last_used_at"`
	LastUsedFrom string     `json:"last_used_from,omitempty"`
}

type userInfo struct {
	UID  uint32 `json:"uid"`
	Name string `json:"name,omitempty"`
}

func keyJSON(k *adminv1.Key) keyInfo {
	return keyInfo{
		ID:           k.GetId(),
		Name:         k.GetName(),
		State:        keyState(k),
		Namespaces:   orStar(k.GetNamespaces()),
		Scopes:       orStar(k.GetScopes()),
		CreatedAt:    jsonTime(k.GetCreatedAt()),
		CreatedBy:    userInfo{k.GetCreatedBy(), userName(k.GetCreatedBy())},
		ExpiresAt:    jsonTime(k.GetExpiresAt()),
		RevokedAt:    jsonTime(k.GetRevokedAt()),
		Revocation:   k.GetRevocation(),
		ReplacedBy:   k.GetReplacedBy(),
		SigningKeyID: k.GetSigningKeyId(),
		Requests:     k.GetRequests(),
		LastUsedAt:   jsonTime(k.GetLastUsedAt()),
		LastUsedFrom: k.GetLastUsedFrom(),
	}
}

func keysJSON(keys []*adminv1.Key) []keyInfo {
	list := []keyInfo{} // not null
	for _, k := range keys {
		list = append(list, keyJSON(k))
	}
	return list
}

// keyState returns the state in one word, such as "live".
func keyState(k *adminv1.Key) string {
	return strings.ToLower(strings.TrimPrefix(k.GetState().String(), "KEY_STATE_"))
}

func isLive(k *adminv1.Key) bool { return k.GetState() == adminv1.KeyState_KEY_STATE_LIVE }

// shortID returns a prefix of the id that is long enough to identify the key.
func shortID(k *adminv1.Key) string { return k.GetId()[:min(12, len(k.GetId()))] }

// describeKeyID returns the key's name and id for use in a sentence.
func describeKeyID(k *adminv1.Key) string {
	if k.GetName() == "" {
		return "API key " + k.GetId()
	}
	return fmt.Sprintf("API key %s (%s)", k.GetName(), k.GetId())
}

// validIn describes the namespaces in which the key is valid.
func validIn(k *adminv1.Key) string {
	switch ns := k.GetNamespaces(); len(ns) {
	case 0:
		return "every namespace"
	case 1:
		return "namespace " + ns[0]
	default:
		return "namespaces " + strings.Join(ns, ", ")
	}
}

// scopesText returns what the key allows, for use in a sentence.
func scopesText(k *adminv1.Key) string {
	if len(k.GetScopes()) == 0 {
		return "everything"
	}
	return strings.Join(k.GetScopes(), ", ")
}

// orStar returns a list of namespaces or scopes. The server's empty list, which means all, becomes "*".
func orStar(list []string) []string {
	if len(list) == 0 {
		return []string{"*"}
	}
	return list
}

// acceptedUntil returns when a live key will be refused: when it expires or when its grace period after a rotation ends,
// whichever is first. It returns nil if that is never.
func acceptedUntil(k *adminv1.Key) *timestamppb.Timestamp {
	expiry, revocation := k.GetExpiresAt(), k.GetRevokedAt()
	if expiry == nil || revocation != nil && revocation.AsTime().Before(expiry.AsTime()) {
		return revocation
	}
	return expiry
}

// stateText describes the state of a key. at formats the time at which a rotated key will be refused or was refused.
func stateText(k *adminv1.Key, at func(*timestamppb.Timestamp) string) string {
	state := keyState(k)
	switch revocation := k.GetRevocation(); {
	case revocation == "":
		return state
	case isLive(k):
		return fmt.Sprintf("%s until %s (%s)", state, at(acceptedUntil(k)), revocation)
	default:
		return revocation // it says how the key was revoked
	}
}

// shortTime formats a time without seconds, with the time zone, and without the date if that is today's.
func shortTime(now time.Time) func(*timestamppb.Timestamp) string {
	return func(t *timestamppb.Timestamp) string {
		at := t.AsTime().Local()
		if at.Format(time.DateOnly) == now.Local().Format(time.DateOnly) {
			return at.Format("15:04 MST")
		}
		return at.Format("2006-01-02 15:04 MST")
	}
}

// printKeys prints a table of keys. Keys that are not live are dimmed.
func printKeys(c *cli.Context, keys []*adminv1.Key, now time.Time) error {
	rows := [][]string{{"ID", "NAME", "STATE", "NAMESPACES", "SCOPES", "CREATED", "BY", "EXPIRES IN", "LAST USED", "FROM"}}
	for _, k := range keys {
		rows = append(rows, []string{
			shortID(k), k.GetName(), stateText(k, shortTime(now)),
			strings.Join(orStar(k.GetNamespaces()), ","), strings.Join(orStar(k.GetScopes()), ","), ago(k.GetCreatedAt(), now),
			cmp.Or(userName(k.GetCreatedBy()), strconv.FormatUint(uint64(k.GetCreatedBy()), 10)), expiresIn(k, now),
			ago(k.GetLastUsedAt(), now), k.GetLastUsedFrom(),
		})
	}
	return printColored(c.App.Writer, rows, func(row int) color {
		if row == 0 || isLive(keys[row-1]) {
			return plain
		}
		return dim
	})
}
