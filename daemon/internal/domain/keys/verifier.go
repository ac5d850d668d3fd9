package keys

import (
	"bytes"
	"crypto/ed25519"
	"net/netip"
	"sync"
	"time"
)

// Verifier verifies tokens. It has no access to the private key and does not access the disk. It is safe for concurrent
// use. The Issuer that Open returned with it keeps it up to date.
//
// Anyone can send tokens, and a signature check costs as much as the rest of a request. So a token gets one only if it
// names a live key that is not in use yet, and a few others get one to detect a stolen signing key. All other tokens are
// accepted or refused by comparisons. A valid token is never refused because of other tokens, however many there are
// and wherever they come from.
type Verifier struct {
	keys     *keySet
	clock    *clock
	suspects *suspects
	// checking is held during each signature check, so that all of them together occupy at most one processor.
	checking sync.Mutex
	// checkSignature is verifySignature, except in tests.
	checkSignature func(public ed25519.PublicKey, token string) (payload, footer []byte, err error)
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
	if s := v.keys.sessions.find(token); s != nil {
		return v.use(s, from)
	}
	return v.verifyFirst(token, from)
}

// use counts a request of the key of a session, and returns its principal.
func (v *Verifier) use(s *session, from netip.Addr) (Principal, error) {
	now := v.clock.now()
	if now >= s.until.Load() {
		return Principal{}, &rejection{cause: causeExpired, keyID: s.principal.KeyID}
	}
	s.key.usage.count(now, from)
	return s.principal, nil
}

// verifyFirst verifies a token that has no session.
func (v *Verifier) verifyFirst(token string, from netip.Addr) (Principal, error) {
	body, encodedFooter, rejected := checkForm(token)
	if rejected != nil {
		return Principal{}, rejected
	}
	id := v.keys.trusted()
	if encodedFooter != id.encodedFooter {
		return Principal{}, errUnknownKey
	}
	k, rejected := v.keys.named(id, body)
	if rejected == nil {
		// Tokens that name the same key wait for each other. As soon as one of them is valid, the others need no
		// signature check.
		k.checking.Lock()
		defer k.checking.Unlock()
		if !v.keys.hasSession(k) {
			return v.verifySigned(id, token, from)
		}
		// A request with the same token may have opened the session in the meantime. This server issues only one token
		// for each key, so any other token is refused.
		if s := v.keys.sessions.find(token); s != nil {
			return v.use(s, from)
		}
		rejected = errOtherToken
	}
	if rejected.suspicious {
		v.checkSuspect(id, token, body, rejected, from)
	}
	return Principal{}, rejected
}

// verifySigned verifies a token that names a live key without a session. The caller holds the key's checking lock.
func (v *Verifier) verifySigned(id *identity, token string, from netip.Addr) (Principal, error) {
	payload, err := v.verify(id, token)
	if err != nil {
		return Principal{}, err
	}
	now := v.clock.now()
	p, rejected := v.admit(id, token, payload, now, from)
	if rejected == nil {
		return p, nil
	}
	if rejected.suspicious {
		v.suspects.add(now, string(id.claimed(payload)), rejected.cause, from)
	}
	return Principal{}, rejected
}

// verify checks the signature of a token and returns its payload.
func (v *Verifier) verify(id *identity, token string) ([]byte, error) {
	v.checking.Lock()
	defer v.checking.Unlock()
	payload, footer, err := v.checkSignature(id.public, token)
	if err == nil && string(footer) != id.footer {
		err = errUnknownKey
	}
	return payload, err
}

// admit compares a payload that has a valid signature with the record of its key, counts a request, and opens a session.
// It holds the lock while it reads the record and opens the session, so that no revocation can happen in between. The
// caller holds the key's checking lock.
func (v *Verifier) admit(id *identity, token string, payload []byte, now int64, from netip.Addr) (Principal, *rejection) {
	ks := v.keys
	ks.mu.Lock()
	defer ks.mu.Unlock()
	k, rejected := ks.match(id, payload, fromMicros(now))
	if rejected != nil {
		return Principal{}, rejected
	}
	k.usage.count(now, from)
	return ks.openSession(k, token), nil
}

// named returns the live key that the body of a token names. If there is none, it returns why the token is refused.
func (ks *keySet) named(id *identity, body string) (*key, *rejection) {
	var buffer [headSize]byte
	head := decodeBody(buffer[:], body)
	now := ks.clock.time()
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	if k, ok := ks.byID[string(id.claimed(head))]; ok && k.StateAt(now) == Live {
		return k, nil
	}
	return ks.matchBody(id, body, now)
}

// headSize is how many bytes at the beginning of a payload contain the id of the key.
const headSize = 129

// matchBody is like match, but takes the body of a token. The caller holds keySet.mu.
func (ks *keySet) matchBody(id *identity, body string, now time.Time) (*key, *rejection) {
	var buffer [maxLength]byte
	payload := decodeBody(buffer[:], body)
	return ks.match(id, payload[:len(payload)-ed25519.SignatureSize], now)
}

// hasSession reports whether a key is in use.
func (ks *keySet) hasSession(k *key) bool {
	ks.mu.RLock()
	defer ks.mu.RUnlock()
	return k.session != nil
}

// match returns the live key of the signing key id whose claims are exactly payload. It uses no cryptography, so payload
// may be anything. The caller holds keySet.mu.
func (ks *keySet) match(id *identity, payload []byte, now time.Time) (*key, *rejection) {
	if ks.identity.keyID != id.keyID {
		return nil, errUnknownKey
	}
	keyID := string(id.claimed(payload))
	if keyID == "" {
		return nil, errClaims
	}
	k, ok := ks.byID[keyID]
	if !ok {
		if _, pruned := ks.pruned[keyID]; pruned {
			return nil, &rejection{cause: causePruned, keyID: keyID}
		}
		// Prune leaves no trace of an expired key.
		if reached(claimedExpiry(payload), now) {
			return nil, errExpired
		}
		return nil, errNoRecord
	}
	// This comparison covers all claims.
	if want, err := id.payload(k.Record); err != nil || k.SigningKeyID != id.keyID || !bytes.Equal(payload, want) {
		return nil, &rejection{cause: causeMismatch, keyID: keyID, suspicious: true}
	}
	return k, k.refusal(now)
}

// checkSuspect reports a token that was refused for a suspicious reason if its signature is valid. Of a flood of such
// tokens, it checks only some.
func (v *Verifier) checkSuspect(id *identity, token, body string, refused *rejection, from netip.Addr) {
	var buffer [headSize]byte
	now, keyID := v.clock.now(), string(id.claimed(decodeBody(buffer[:], body)))
	if !v.suspects.mayCheck(now, keyID) {
		return
	}
	if _, err := v.verify(id, token); err == nil {
		v.suspects.add(now, keyID, refused.cause, from)
	}
}
