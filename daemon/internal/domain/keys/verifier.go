package keys

import (
	"bytes"
	"net/netip"
)

// Verifier verifies tokens. It has no access to the private key and does not access the disk. It is safe for concurrent
// use. The Issuer that Open returned with it keeps it up to date.
type Verifier struct {
	keys     *keySet
	clock    *clock
	suspects *suspects
}

// Verify verifies a token, including its msb_ prefix, and returns its principal. It also counts a request of the key
// from the address from, which may be the zero Addr. If the token is refused, the error is
// errdefs.ErrUnauthenticated, and its message is the same for all causes. If the error itself is passed to slog, slog
// logs the cause.
//
// For a token that was accepted before, Verify uses no cryptography and takes no lock. It allocates only if the
// previous request with the key came from another address.
func (v *Verifier) Verify(token string, from netip.Addr) (Principal, error) {
	if len(token) > maxLength {
		return Principal{}, errTooLong
	}
	s := v.keys.sessions.find(token)
	if s == nil {
		return v.verifyFirst(token, from)
	}
	now := v.clock.now()
	if now >= s.until.Load() {
		return Principal{}, &rejection{cause: causeExpired, keyID: s.principal.KeyID}
	}
	s.key.usage.count(now, from)
	return s.principal, nil
}

// Known reports whether the token has a session, that is, whether Verify has accepted it before and its key is still
// live. It does not count a request, takes no lock and does not allocate. Its running time does not reveal how much of
// a guessed token is right.
func (v *Verifier) Known(token string) bool {
	if len(token) > maxLength {
		return false
	}
	s := v.keys.sessions.find(token)
	return s != nil && v.clock.now() < s.until.Load()
}

// verifyFirst verifies a token that has no session.
func (v *Verifier) verifyFirst(token string, from netip.Addr) (Principal, error) {
	encodedFooter, rejected := checkForm(token)
	if rejected != nil {
		return Principal{}, rejected
	}
	id := v.keys.trusted()
	// The footer is not trusted yet. This check only avoids verifying signatures of other signing keys.
	if encodedFooter != id.encodedFooter {
		return Principal{}, errUnknownKey
	}
	payload, footer, err := verifySignature(id.public, token)
	if err != nil {
		return Principal{}, err
	}
	if string(footer) != id.footer {
		return Principal{}, errUnknownKey
	}
	p, rejected := v.admit(id, token, payload, from)
	if rejected != nil {
		return Principal{}, rejected
	}
	return p, nil
}

// admit compares a payload that has a valid signature with the record of its key, and opens a session. It holds the
// lock while it reads the record and opens the session, so that no revocation can happen in between.
func (v *Verifier) admit(id *identity, token string, payload []byte, from netip.Addr) (Principal, *rejection) {
	now := v.clock.now()
	suspect := func(cause, keyID string) (Principal, *rejection) {
		refused := &rejection{cause: cause, keyID: keyID}
		v.suspects.add(now, refused, from)
		return Principal{}, refused
	}
	keyID, ok := id.claimedKeyID(payload)
	if !ok {
		return suspect(causeClaims, "")
	}
	ks := v.keys
	ks.mu.Lock()
	defer ks.mu.Unlock()
	if ks.identity.keyID != id.keyID {
		return Principal{}, errUnknownKey
	}
	k, ok := ks.byID[keyID]
	if !ok {
		// The record may have been pruned. If the token has expired, its claims show that. If it was revoked, it
		// cannot be distinguished from one that was signed with a stolen signing key, so report it as a suspect:
		// a false alarm is better than a missed one.
		if reached(claimedExpiry(payload), fromMicros(now)) {
			return Principal{}, &rejection{cause: causeExpired, keyID: keyID}
		}
		return suspect(causeUnknown, keyID)
	}
	// This comparison covers all claims.
	if want, err := id.payload(k.Record); err != nil || k.SigningKeyID != id.keyID || !bytes.Equal(payload, want) {
		return suspect(causeMismatch, keyID)
	}
	if refused := k.refusal(fromMicros(now)); refused != nil {
		return Principal{}, refused
	}
	k.usage.count(now, from)
	return ks.openSession(k, token), nil
}
