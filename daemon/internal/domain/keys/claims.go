package keys

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
)

const issuerName = "msbd"

// claims is the signed content of a token. It is only encoded, never decoded: a token is valid only if its payload
// is, byte for byte, the encoding of its record. This way no ambiguity in the JSON can be exploited. The order of the
// fields is therefore part of the format, and any new field must be omitted when empty.
type claims struct {
	Issuer string `json:"iss"`
	// Audience is the instance id of the server that issued the token.
	Audience string `json:"aud"`
	ID       string `json:"jti"`
	// Namespaces are joined by commas. Empty means all namespaces.
	Namespaces string  `json:"ns"`
	Scopes     []Scope `json:"scopes,omitempty"`
	IssuedAt   string  `json:"iat"`
	// Expires is null in a token that never expires.
	Expires *string `json:"exp"`
}

// footer is the footer of a token. It identifies the signing key.
type footer struct {
	KeyID string `json:"kid"`
}

// identity holds the public information about a signing key, which is all that is needed to verify its tokens.
type identity struct {
	instanceID string
	keyID      string
	public     ed25519.PublicKey
	// footer is the footer of every token of this signing key. encodedFooter is its base64url encoding.
	footer, encodedFooter string
	// claimsPrefix is the beginning of the claims in every token of this signing key, up to the id of the API key.
	claimsPrefix []byte
}

func newIdentity(instanceID, keyID string, public ed25519.PublicKey) (*identity, error) {
	f, err := json.Marshal(footer{KeyID: keyID})
	if err != nil {
		return nil, fmt.Errorf("encode footer: %w", err)
	}
	return &identity{
		instanceID:    instanceID,
		keyID:         keyID,
		public:        public,
		footer:        string(f),
		encodedFooter: base64.RawURLEncoding.EncodeToString(f),
		claimsPrefix:  []byte(`{"iss":"` + issuerName + `","aud":"` + instanceID + `","jti":"`),
	}, nil
}

// payload returns the encoded claims of a record, which the signing key signs.
func (id *identity) payload(r Record) ([]byte, error) {
	c := claims{
		Issuer:     issuerName,
		Audience:   id.instanceID,
		ID:         r.ID,
		Namespaces: strings.Join(r.Namespaces, ","),
		Scopes:     r.Scopes,
		IssuedAt:   r.CreatedAt.UTC().Format(time.RFC3339Nano),
	}
	if !r.ExpiresAt.IsZero() {
		exp := r.ExpiresAt.UTC().Format(time.RFC3339Nano)
		c.Expires = &exp
	}
	return json.Marshal(c)
}

// claimed returns the id of the API key that a payload names, or nothing if it names none. The payload may be any bytes.
func (id *identity) claimed(payload []byte) (keyID []byte) {
	rest, ok := bytes.CutPrefix(payload, id.claimsPrefix)
	if !ok || len(rest) < idLength || !isID(rest[:idLength]) {
		return nil
	}
	return rest[:idLength]
}

// claimedExpiry returns the expiry in a payload, or zero if there is none.
func claimedExpiry(payload []byte) time.Time {
	_, exp, _ := bytes.Cut(payload, []byte(`,"exp":"`))
	exp, _, _ = bytes.Cut(exp, []byte(`"`))
	t, _ := time.Parse(time.RFC3339Nano, string(exp))
	return t
}
