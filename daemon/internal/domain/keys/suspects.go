package keys

import (
	"net/netip"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/msbd/msbd/api/audit"
)

// suspects collects suspicious tokens. Their signature is valid, but this server did not issue them, so somebody may
// have stolen the signing key. A request only adds its token here; Issuer.Run later writes the event to the audit log.
//
// A flood of such tokens cannot fill the log, because each key id is logged at most once in suspectInterval, and at
// most maxSuspects key ids are logged in that time. A flood of tokens with invalid signatures costs little, because only
// some of them are checked. During such a flood, a token of a stolen signing key may therefore go unreported. It is
// refused nevertheless.
type suspects struct {
	// checks limits the signature checks of refused tokens.
	checks *rate.Limiter
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
	// Refused tokens get suspectChecksBurst signature checks at once, and suspectChecksPerSecond after that.
	suspectChecksBurst     = 100
	suspectChecksPerSecond = 50
)

func newSuspects() *suspects {
	return &suspects{
		checks:  rate.NewLimiter(suspectChecksPerSecond, suspectChecksBurst),
		waiting: make(chan struct{}, 1), seen: make(map[string]struct{}),
	}
}

// mayCheck reports whether the signature of a refused token that names keyID should be checked now.
func (s *suspects) mayCheck(now int64, keyID string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.startIntervalIfDue(now)
	_, seen := s.seen[keyID]
	return !seen && s.checks.Allow()
}

// add adds a token with a valid signature that names the key keyID, or "", and that was refused because of cause in a
// request from the address from.
func (s *suspects) add(now int64, keyID, cause string, from netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.startIntervalIfDue(now)
	if _, ok := s.seen[keyID]; ok {
		return
	}
	if len(s.seen) == maxSuspects {
		s.skipped++
		return
	}
	s.seen[keyID] = struct{}{}
	detail := map[string]string{"cause": cause}
	if from.IsValid() {
		detail["from"] = from.String()
	}
	s.addEvent(audit.Event{Action: audit.KeySuspect, Actor: audit.ActorServer, Target: keyID, Detail: detail})
}

// startIntervalIfDue starts a new interval if the current one has passed. It adds an event with the number of tokens that
// were skipped in the previous one. The caller holds s.mu.
func (s *suspects) startIntervalIfDue(now int64) {
	if now >= s.since && now-s.since < suspectInterval.Microseconds() {
		return
	}
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
