package keys

import (
	"bytes"
	"net/netip"
)

// Verifier says whom a token speaks for. It holds no private key and never touches the disk. It is
// safe for concurrent use; the Issuer that made it keeps it up to date.
type Verifier struct {
	keys     *keySet
	clock    *clock
	suspects *suspects
}

// Verify returns whom the token (with its msb_ prefix) speaks for, and counts one use of its key by
// from, which may be the zero Addr. Every refusal is errdefs.ErrUnauthenticated with one text, whatever
// the cause; slog prints the cause when it is given the error itself.
//
// For a token that was seen before this takes no cryptography and no lock, nor the heap unless the last
// request with it came from another address.
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

// Known reports whether the token has a session: Verify accepted it before, and its key is still good. It
// counts no use, takes no lock and no heap, and its time does not depend on how much of a token is right.
func (v *Verifier) Known(token string) bool {
	if len(token) > maxLength {
		return false
	}
	s := v.keys.sessions.find(token)
	return s != nil && v.clock.now() < s.until.Load()
}

// verifyFirst does the whole check of a token that was not seen before.
func (v *Verifier) verifyFirst(token string, from netip.Addr) (Principal, error) {
	encodedFooter, rejected := checkForm(token)
	if rejected != nil {
		return Principal{}, rejected
	}
	id := v.keys.trusted()
	// The footer is not believed yet: it only spares us the signatures of other keys.
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
	p, rejected := v.admit(id, token, payload, from)
	if rejected != nil {
		return Principal{}, rejected
	}
	return p, nil
}

// admit compares a well-signed payload with the record of its key and opens a session. The record is
// read and the session opened under one lock: a revocation comes before both or after.
func (v *Verifier) admit(id *identity, token string, payload []byte, from netip.Addr) (Principal, *rejection) {
	now := v.clock.now()
	suspect := func(cause, keyID string) (Principal, *rejection) {
		refused := &rejection{cause: cause, keyID: keyID}
		v.suspects.note(now, refused, from)
		return Principal{}, refused
	}
	keyID, ok := id.keyIDOf(payload)
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
		// The record may have been pruned. An expired token says so itself; one that was revoked looks
		// like one that a thief of the signing key made: better too many of these than too few.
		if reached(expiryOf(payload), moment(now)) {
			return Principal{}, &rejection{cause: causeExpired, keyID: keyID}
		}
		return suspect(causeUnknown, keyID)
	}
	// One comparison covers every claim.
	if want, err := id.payload(k.Record); err != nil || k.SigningKeyID != id.keyID || !bytes.Equal(payload, want) {
		return suspect(causeMismatch, keyID)
	}
	if refused := k.refusal(moment(now)); refused != nil {
		return Principal{}, refused
	}
	k.usage.count(now, from)
	return ks.openSession(k, token), nil
}
