package keys

import (
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/msbd/msbd/api/audit"
)

// suspects takes down tokens that the signing key signed and the server never issued: somebody else may
// have the key. Requests only take them down; Run writes them to the audit log. However many there are,
// each key id is written once in suspectInterval, and of all of them no more than maxSuspects.
type suspects struct {
	// waiting has an element while pending is not empty.
	waiting chan struct{}

	mu sync.Mutex
	// since is when the present interval began, in microseconds since 1970.
	since   int64
	seen    map[string]struct{} // the key ids of the interval
	more    int                 // what came in it beyond maxSuspects
	pending []audit.Event
}

const (
	suspectInterval = time.Minute
	maxSuspects     = 64
)

func newSuspects() *suspects {
	return &suspects{waiting: make(chan struct{}, 1), seen: make(map[string]struct{})}
}

// note takes down one token.
func (s *suspects) note(now int64, refused *rejection, from netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now-s.since >= suspectInterval.Microseconds() || now < s.since {
		s.turn()
		s.since = now
	}
	if _, ok := s.seen[refused.keyID]; ok {
		return
	}
	if len(s.seen) == maxSuspects {
		s.more++
		return
	}
	s.seen[refused.keyID] = struct{}{}
	detail := map[string]string{"cause": refused.cause}
	if from.IsValid() {
		detail["from"] = from.String()
	}
	s.add(audit.Event{Action: audit.KeySuspect, Actor: audit.ActorServer, Target: refused.keyID, Detail: detail})
}

// turn begins an interval, and tells of what the last one left out. The caller holds s.mu.
func (s *suspects) turn() {
	clear(s.seen)
	if s.more > 0 {
		s.add(audit.Event{Action: audit.KeySuspect, Actor: audit.ActorServer, Detail: map[string]string{
			"cause": "more of the same", "count": strconv.Itoa(s.more),
		}})
		s.more = 0
	}
}

// add lets an event wait for take. If nobody can write them, only the first are kept. The caller holds
// s.mu.
func (s *suspects) add(e audit.Event) {
	if len(s.pending) < 2*maxSuspects {
		s.pending = append(s.pending, e)
	}
	select {
	case s.waiting <- struct{}{}:
	default:
	}
}

// take returns what waits to be written.
func (s *suspects) take() []audit.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	events := s.pending
	s.pending = nil
	return events
}

// putBack lets events wait that could not be written.
func (s *suspects) putBack(events []audit.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending = append(events, s.pending...)
}

// reportSuspects writes what suspects took down.
func (i *Issuer) reportSuspects() {
	events := i.suspects.take()
	if len(events) == 0 {
		return
	}
	for _, e := range events {
		i.log.Warn("the signing key may be stolen: a token that it signed was not issued by this server",
			"key_id", e.Target, "cause", e.Detail["cause"], "from", e.Detail["from"])
	}
	if err := i.store.CommitKeys(Change{Events: events}); err != nil {
		i.log.Error("suspicious tokens cannot be written to the audit log; it is tried again", "events", len(events), "err", err)
		i.suspects.putBack(events)
	}
}
