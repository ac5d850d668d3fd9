package keys

import (
	"context"
	"hash/maphash"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// session is what makes the second request with a key cheap: the token whose signature and claims were
// found good, and whom it speaks for. A key has one from its first request until it is refused.
type session struct {
	key       *key
	token     string
	principal Principal
	// until is when the key expires or a rotation ends it, in microseconds since 1970.
	until atomic.Int64
	// timer closes the session then. It is changed under keySet.mu.
	timer *time.Timer
	// end ends principal.alive.
	end context.CancelCauseFunc
}

const never = math.MaxInt64

// sessionCache finds the session of a token, without a lock. There are at most as many sessions as live keys.
type sessionCache struct {
	seed   maphash.Seed
	byHash sync.Map // from uint64 to *session
}

func newSessionCache() *sessionCache { return &sessionCache{seed: maphash.MakeSeed()} }

// find returns the session of a token, or nil. Nobody can aim at the hash, whose seed is secret, so how
// long this takes does not tell how much of a guessed token is right.
func (c *sessionCache) find(token string) *session {
	found, ok := c.byHash.Load(c.hash(token))
	if !ok {
		return nil
	}
	if s := found.(*session); s.token == token {
		return s
	}
	return nil
}

func (c *sessionCache) hash(token string) uint64 { return maphash.String(c.seed, token) }

// openSession begins a session of a live key, unless it has one. That is the same token's, opened by a request
// beside this one; or a thief of the signing key made another good token, which gets no session of its own.
// The caller holds keySet.mu.
func (ks *keySet) openSession(k *key, token string) Principal {
	if k.session != nil {
		return k.session.principal
	}
	alive, end := context.WithCancelCause(context.Background())
	s := &session{
		key: k,
		// A copy, because the caller's token may be a piece of a much longer header.
		token:     strings.Clone(token),
		principal: Principal{KeyID: k.ID, Namespaces: k.Namespaces, Scopes: k.Scopes, alive: alive},
		end:       end,
	}
	k.session = s
	ks.scheduleExpiry(s)
	ks.sessions.byHash.Store(ks.sessions.hash(s.token), s)
	return s.principal
}

// closeSession ends the session of a key, if it has one, and whatever is bound to it. The caller holds keySet.mu.
func (ks *keySet) closeSession(k *key, cause *rejection) {
	s := k.session
	if s == nil {
		return
	}
	k.session = nil
	ks.sessions.byHash.Delete(ks.sessions.hash(s.token))
	if s.timer != nil {
		s.timer.Stop()
	}
	s.end(cause)
}

// refreshSession closes the session of a key that is refused now. Another session continues for as long as
// the record says. The caller holds keySet.mu.
func (ks *keySet) refreshSession(k *key) {
	if cause := k.refusal(ks.clock.time()); cause != nil {
		ks.closeSession(k, cause)
	} else if k.session != nil {
		ks.scheduleExpiry(k.session)
	}
}

// scheduleExpiry sets the end of a session to that of its key. The caller holds keySet.mu.
func (ks *keySet) scheduleExpiry(s *session) {
	until := s.key.Until()
	if until.IsZero() {
		s.until.Store(never)
		return
	}
	s.until.Store(until.UnixMicro())
	const longest = 365 * 24 * time.Hour // of a timer; then it is set again
	remaining := until.UnixMicro() - ks.clock.now()
	wait := time.Duration(max(0, min(remaining, longest.Microseconds()))) * time.Microsecond
	if s.timer == nil {
		s.timer = time.AfterFunc(wait, func() { ks.expire(s) })
	} else {
		s.timer.Reset(wait)
	}
}

// expire refreshes a session whose time may be over.
func (ks *keySet) expire(s *session) {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	if s.key.session == s {
		ks.refreshSession(s.key)
	}
}

// expireAll refreshes every session whose time is over. The timers of the sessions do that by themselves,
// unless the clock was set forward.
func (ks *keySet) expireAll() {
	now := ks.clock.now()
	ks.mu.Lock()
	defer ks.mu.Unlock()
	for _, k := range ks.oldest {
		if k.session != nil && k.session.until.Load() <= now {
			ks.refreshSession(k)
		}
	}
}

// refusal is why a key is not accepted at now; nil if it is.
func (r Record) refusal(now time.Time) *rejection {
	switch r.StateAt(now) {
	case Revoked:
		return &rejection{cause: causeRevoked, keyID: r.ID}
	case Expired:
		return &rejection{cause: causeExpired, keyID: r.ID}
	default:
		return nil
	}
}
