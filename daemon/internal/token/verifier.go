package token

import (
	"bytes"
	"strings"
	"sync"
	"time"
)

// maxVerified bounds the cache of verified tokens: about 16 MiB.
const maxVerified = 16 << 10

// Verifier says whom a token speaks for. It holds no private key and never touches the disk. It is
// safe for concurrent use; the Issuer that made it keeps it up to date.
type Verifier struct {
	mu       sync.RWMutex
	identity *identity
	// records holds every key by id, dead ones too.
	records map[string]Record
	// verified remembers tokens whose signature and claims were good. An entry goes when its key is
	// revoked or expires; until then, only its expiry needs checking.
	verified map[string]verified
}

type verified struct {
	principal Principal
	expiresAt time.Time
}

// newVerifier needs a trust before it is used.
func newVerifier(records []Record) *Verifier {
	v := &Verifier{
		records:  make(map[string]Record, len(records)),
		verified: make(map[string]verified),
	}
	for _, r := range records {
		v.records[r.ID] = r
	}
	return v
}

// Verify returns whom the token (with its msb_ prefix) speaks for. Every refusal is
// errdefs.ErrUnauthenticated with one text, whatever the cause; slog prints the cause when it is
// given the error itself.
func (v *Verifier) Verify(token string) (Principal, error) {
	if len(token) > maxLength {
		return Principal{}, errTooLong
	}
	v.mu.RLock()
	seen, ok := v.verified[token]
	id := v.identity
	v.mu.RUnlock()
	if !ok {
		return v.verifyFirst(id, token)
	}
	if expired(seen.expiresAt, time.Now()) {
		v.forget(token)
		return Principal{}, &rejection{cause: causeExpired, keyID: seen.principal.KeyID}
	}
	return seen.principal, nil
}

// verifyFirst does the whole check of a token that was not seen before.
func (v *Verifier) verifyFirst(id *identity, token string) (Principal, error) {
	encodedFooter, rejected := checkForm(token)
	if rejected != nil {
		return Principal{}, rejected
	}
	// The footer is not trusted yet: it only spares us the signatures of other keys.
	if encodedFooter != id.encodedFooter {
		return Principal{}, errUnknownKey
	}
	payload, footer, err := open(id.public, token)
	if err != nil {
		return Principal{}, err
	}
	if string(footer) != id.footer {
		return Principal{}, errUnknownKey
	}
	keyID, ok := id.keyIDOf(payload)
	if !ok {
		return Principal{}, errClaims
	}
	return v.admit(id, token, keyID, payload)
}

// admit compares a well-signed payload with the record of its key and remembers the token. The
// record is read and the token remembered under one lock: a revocation comes before both or after.
func (v *Verifier) admit(id *identity, token, keyID string, payload []byte) (Principal, error) {
	refuse := func(cause string) (Principal, error) {
		return Principal{}, &rejection{cause: cause, keyID: keyID}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.identity != id {
		return Principal{}, errUnknownKey
	}
	r, ok := v.records[keyID]
	switch {
	case !ok:
		return refuse(causeUnknown)
	case r.Revoked():
		return refuse(causeRevoked)
	case r.SigningKeyID != id.keyID:
		return refuse(causeMismatch)
	case r.Expired(time.Now()):
		return refuse(causeExpired)
	}
	// One comparison covers every claim.
	if want, err := id.payload(r); err != nil || !bytes.Equal(payload, want) {
		return refuse(causeMismatch)
	}
	p := Principal{KeyID: r.ID, Namespace: r.Namespace, Scopes: r.Scopes}
	if len(v.verified) >= maxVerified {
		for other := range v.verified { // map order: an arbitrary one
			delete(v.verified, other)
			break
		}
	}
	// A copy, because the caller's token may be a piece of a much longer header.
	v.verified[strings.Clone(token)] = verified{principal: p, expiresAt: r.ExpiresAt}
	return p, nil
}

func (v *Verifier) forget(token string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.verified, token)
}

// add makes a new record's token good.
func (v *Verifier) add(r Record) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.records[r.ID] = r
}

// trust takes only tokens of id from now on and marks the records of every other signing key
// revoked. It returns how many it marked, and how many of these were live.
func (v *Verifier) trust(id *identity, at time.Time) (marked, live int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.identity = id
	clear(v.verified)
	for keyID, r := range v.records {
		if r.Revoked() || r.SigningKeyID == id.keyID {
			continue
		}
		marked++
		if !r.Expired(at) {
			live++
		}
		r.RevokedAt = at
		v.records[keyID] = r
	}
	return marked, live
}

func (v *Verifier) counts(now time.Time) (c Counts) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	for _, r := range v.records {
		switch {
		case r.Revoked():
			c.Revoked++
		case r.Expired(now):
			c.Expired++
		default:
			c.Live++
		}
	}
	return c
}
