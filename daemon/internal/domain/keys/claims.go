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

// claims is what a token says. It is never decoded: a token is good only if it is, byte for byte, what
// its record would be signed as, and of a canonical text nothing can be read in two ways. So the order
// of the fields is part of the format, and a field that is added must be omitted when empty.
type claims struct {
	Issuer string `json:"iss"`
	// Audience is the instance id of the server that issued the token.
	Audience string `json:"aud"`
	ID       string `json:"jti"`
	// Namespaces are joined by commas; empty means every one.
	Namespaces string  `json:"ns"`
	Scopes     []Scope `json:"scopes,omitempty"`
	IssuedAt   string  `json:"iat"`
	// Expires is null in a token that never expires.
	Expires *string `json:"exp"`
}

// footer selects the signing key.
type footer struct {
	KeyID string `json:"kid"`
}

// identity is the public side of a signing key: what it takes to recognise its tokens.
type identity struct {
	instanceID string
	keyID      string
	public     ed25519.PublicKey
	// footer and encodedFooter are those of every token that the key signs.
	footer, encodedFooter string
	// beforeID is how the claims of each of them begin, up to the key's id.
	beforeID []byte
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
		beforeID:      []byte(`{"iss":"` + issuerName + `","aud":"` + instanceID + `","jti":"`),
	}, nil
}

// payload is what the key signs for a record.
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

// keyIDOf finds the id of the key in a payload, which need not be one of payload's.
func (id *identity) keyIDOf(payload []byte) (keyID string, ok bool) {
	rest, ok := bytes.CutPrefix(payload, id.beforeID)
	if !ok || len(rest) < idLength || !isID(rest[:idLength]) {
		return "", false
	}
	return string(rest[:idLength]), true
}

// expiryOf is the expiry that a payload claims; zero if it claims none.
func expiryOf(payload []byte) time.Time {
	_, exp, _ := bytes.Cut(payload, []byte(`,"exp":"`))
	exp, _, _ = bytes.Cut(exp, []byte(`"`))
	t, _ := time.Parse(time.RFC3339Nano, string(exp))
	return t
}
