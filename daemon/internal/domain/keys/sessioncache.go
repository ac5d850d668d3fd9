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

// session caches the result of verifying a token: the token, whose signature and claims are valid, and its principal.
// This makes further requests with the key cheap. A key has a session from its first request until it is refused.
type session struct {
	key       *key
	token     string
	principal Principal
	// until is when the key expires or its grace period ends, in microseconds since 1970.
	until atomic.Int64
	// timer closes the session at the time until. It is guarded by keySet.mu.
	timer *time.Timer
	// cancel cancels principal.alive.
	cancel context.CancelCauseFunc
}

// neverExpires is the value of session.until for a key that does not expire.
const neverExpires = math.MaxInt64

// sessionCache finds the session of a token without a lock. There are at most as many sessions as live keys.
type sessionCache struct {
	seed   maphash.Seed
	byHash sync.Map // from uint64 to *session
}

func newSessionCache() *sessionCache { return &sessionCache{seed: maphash.MakeSeed()} }

// find returns the session of a token, or nil. The time that it takes does not reveal how much of a guessed token is
// right: the seed of the hash is secret, so nobody can choose a token with the hash of another.
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

// openSession opens a session for a live key and returns its principal. If the key already has a session, openSession
// returns the principal of that one. The caller holds keySet.mu.
func (ks *keySet) openSession(k *key, token string) Principal {
	if k.session != nil {
		return k.session.principal
	}
	alive, cancel := context.WithCancelCause(context.Background())
	s := &session{
		key: k,
		// Copy the token, because it may be a substring that keeps a much longer header in memory.
		token:     strings.Clone(token),
		principal: Principal{KeyID: k.ID, Namespaces: k.Namespaces, Scopes: k.Scopes, alive: alive},
		cancel:    cancel,
	}
	k.session = s
	ks.scheduleExpiry(s)
	ks.sessions.byHash.Store(ks.sessions.hash(s.token), s)
	return s.principal
}

// closeSession closes the session of a key, if it has one, and cancels all contexts that are bound to it. The caller
// holds keySet.mu.
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
	s.cancel(cause)
}

// refreshSession updates a key's session after the key's record has changed or the key may have expired. If the key is
// refused now, refreshSession closes the session. Otherwise it schedules the session's expiry again. The caller holds
// keySet.mu.
func (ks *keySet) refreshSession(k *key) {
	if cause := k.refusal(ks.clock.time()); cause != nil {
		ks.closeSession(k, cause)
	} else if k.session != nil {
		ks.scheduleExpiry(k.session)
	}
}

// scheduleExpiry sets s.until and s.timer to the time at which the key of s will be refused. The caller holds
// keySet.mu.
func (ks *keySet) scheduleExpiry(s *session) {
	until := s.key.Until()
	if until.IsZero() {
		s.until.Store(neverExpires)
		return
	}
	s.until.Store(until.UnixMicro())
	const longest = 365 * 24 * time.Hour // the longest that a timer runs before expire sets it again
	remaining := until.UnixMicro() - ks.clock.now()
	wait := time.Duration(max(0, min(remaining, longest.Microseconds()))) * time.Microsecond
	if s.timer == nil {
		s.timer = time.AfterFunc(wait, func() { ks.expire(s) })
	} else {
		s.timer.Reset(wait)
	}
}

// expire refreshes the session s, whose timer has fired.
func (ks *keySet) expire(s *session) {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	if s.key.session == s {
		ks.refreshSession(s.key)
	}
}

// refreshAll refreshes every session. It is needed only after the clock was set forward or back, because the timers of the
// sessions then fire at the wrong time.
func (ks *keySet) refreshAll() {
	ks.mu.Lock()
	defer ks.mu.Unlock()
	for _, k := range ks.byAge {
		if k.session != nil {
			ks.refreshSession(k)
		}
	}
}

// refusal returns why the key is refused at the time now, or nil if it is accepted.
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
