package keys

import (
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/msbd/msbd/api/audit"
)

// suspects collects suspicious tokens. Their signature is valid, but this server did not issue them, so somebody may
// have stolen the signing key. A request only adds its token here; Issuer.Run later writes the event to the audit log.
// A flood of such tokens cannot fill the log, because each key id is logged at most once in suspectInterval, and at
// most maxSuspects key ids are logged in that time.
type suspects struct {
	// waiting holds an element if events were added to pending since Issuer.Run last received from it.
	waiting chan struct{}

	mu sync.Mutex
	// since is when the current interval began, in microseconds since 1970.
	since   int64
	seen    map[string]struct{} // the key ids that were added in the current interval
	skipped int                 // how many tokens were not added in the current interval because of maxSuspects
	pending []audit.Event
}

const (
	suspectInterval = time.Minute
	maxSuspects     = 64
)

func newSuspects() *suspects {
	return &suspects{waiting: make(chan struct{}, 1), seen: make(map[string]struct{})}
}

// add adds a token that was refused in a request from the address from.
func (s *suspects) add(now int64, refused *rejection, from netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now-s.since >= suspectInterval.Microseconds() || now < s.since {
		s.startInterval(now)
	}
	if _, ok := s.seen[refused.keyID]; ok {
		return
	}
	if len(s.seen) == maxSuspects {
		s.skipped++
		return
	}
	s.seen[refused.keyID] = struct{}{}
	detail := map[string]string{"cause": refused.cause}
	if from.IsValid() {
		detail["from"] = from.String()
	}
	s.addEvent(audit.Event{Action: audit.KeySuspect, Actor: audit.ActorServer, Target: refused.keyID, Detail: detail})
}

// startInterval starts a new interval. It adds an event with the number of tokens that were skipped in the previous
// one. The caller holds s.mu.
func (s *suspects) startInterval(now int64) {
	s.since = now
	clear(s.seen)
	if s.skipped > 0 {
		s.addEvent(audit.Event{Action: audit.KeySuspect, Actor: audit.ActorServer, Detail: map[string]string{
			"cause": "further suspicious tokens", "count": strconv.Itoa(s.skipped),
		}})
		s.skipped = 0
	}
}

// addEvent adds an event for take to return. If too many events are pending because they cannot be written, addEvent
// drops it. The caller holds s.mu.
func (s *suspects) addEvent(e audit.Event) {
	if len(s.pending) < 2*maxSuspects {
		s.pending = append(s.pending, e)
	}
	select {
	case s.waiting <- struct{}{}:
	default:
	}
}

// take removes and returns the events that are pending.
func (s *suspects) take() []audit.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	events := s.pending
	s.pending = nil
	return events
}

// putBack makes events pending again that take has returned but that could not be written.
func (s *suspects) putBack(events []audit.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending = append(events, s.pending...)
}

// reportSuspects writes the suspicious tokens to the audit log and to the server's log.
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
		i.log.Error("could not write suspicious tokens to the audit log; will try again", "events", len(events), "err", err)
		i.suspects.putBack(events)
	}
}
