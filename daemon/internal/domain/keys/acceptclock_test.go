package keys

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/audit"
)

// wrongClock is an issuer whose clock was ahead by a day when some of its keys were created and revoked.
type wrongClock struct {
	store  Memory
	i      *Issuer
	v      *Verifier
	clock  *manualClock
	opts   Options
	right  time.Time // the time now
	tokens map[string]string
	ids    map[string]string
}

func newWrongClock(t *testing.T) *wrongClock {
	w := &wrongClock{store: NewMemory(), clock: newManualClock("2026-01-10T10:00:00Z"), tokens: map[string]string{}, ids: map[string]string{}}
	w.opts = options(w.store, keyringPath(t))
	w.opts.readClock, w.opts.asleep = w.clock.read, w.clock.slept
	w.i, w.v = openWith(t, w.opts)
	w.right = w.clock.now()
	w.issue(t, "before, forever", IssueRequest{Name: "forever"})
	w.issue(t, "before, for an hour", IssueRequest{Name: "hour", Expire: "1h"})
	w.issue(t, "before, for a week", IssueRequest{Expire: "1w"})
	w.issue(t, "before, revoked", IssueRequest{Expire: "1w"})
	w.issue(t, "before, rotated meanwhile", IssueRequest{})
	w.issue(t, "before, grace until tomorrow", IssueRequest{Name: "grace"})
	w.rotate(t, "before, grace until tomorrow", "grace's successor", "12h")

	w.clock.set(w.right.Add(24 * time.Hour))
	w.issue(t, "meanwhile, forever", IssueRequest{})
	w.issue(t, "meanwhile, for an hour", IssueRequest{Expire: "1h"})
	w.issue(t, "meanwhile, the same name", IssueRequest{Name: "hour"})
	w.rotate(t, "before, rotated meanwhile", "rotated meanwhile", "2h")
	revoke(t, w.i, w.ids["before, revoked"])
	w.i.saveUsage()
	w.clock.set(w.right)
	w.store.TakeEvents()
	return w
}

func (w *wrongClock) issue(t *testing.T, what string, req IssueRequest) {
	t.Helper()
	token, r := issue(t, w.i, req)
	w.tokens[what], w.ids[what] = token, r.ID
}

func (w *wrongClock) rotate(t *testing.T, what, into, grace string) {
	t.Helper()
	secret, r, _, err := w.i.Rotate(context.Background(), RotateRequest{Ref: w.ids[what], Grace: grace})
	if err != nil {
		t.Fatal(err)
	}
	w.tokens[into], w.ids[into] = secret.Reveal(), r.ID
}

// live returns the keys that are accepted.
func (w *wrongClock) live() map[string]bool {
	live := map[string]bool{}
	for what, token := range w.tokens {
		if _, err := w.v.Verify(token, from); err == nil {
			live[what] = true
		}
	}
	return live
}

// If the time of a clock that was ahead before is accepted, keys expire as if it had never been ahead. Keys that were
// revoked stay revoked, and keys that would be valid for too long are revoked.
func TestAcceptClock(t *testing.T) {
	t.Parallel()
	w := newWrongClock(t)
	before := map[string]bool{
		"before, forever": true, "before, for a week": true, "before, rotated meanwhile": true, "grace's successor": true,
		"meanwhile, forever": true, "meanwhile, for an hour": true, "meanwhile, the same name": true, "rotated meanwhile": true,
	}
	if diff := cmp.Diff(before, w.live()); diff != "" {
		t.Errorf("before: %s", diff)
	}
	want := ClockChange{From: w.right.Add(24 * time.Hour), To: w.right, Revived: 1, Revoked: 1}
	if got, err := w.i.AcceptClock(t.Context(), true, 7); err != nil || got != want {
		t.Errorf("the dry run returns %+v, %v, want %+v", got, err, want)
	}
	w.store.FailWith(errDisk)
	if _, err := w.i.AcceptClock(t.Context(), false, 7); !errors.Is(err, errDisk) {
		t.Errorf("with a failing store: %v", err)
	}
	w.store.FailWith(nil)
	if diff := cmp.Diff(before, w.live()); diff != "" || w.store.Events() != nil || w.i.ClockBehind() == 0 {
		t.Errorf("the dry run or the failure changed something: %s", diff)
	}

	bound, cancel := accepted(t, w.v, w.tokens["meanwhile, for an hour"]).Bind(t.Context())
	defer cancel()
	if got, err := w.i.AcceptClock(t.Context(), false, 7); err != nil || got != want {
		t.Errorf("AcceptClock returns %+v, %v, want %+v", got, err, want)
	}
	canceledByRefusal(t, bound)
	wantEvents := []audit.Event{
		{Action: audit.ClockAccept, Actor: "uid:7", Detail: map[string]string{
			"from": "2026-01-11T10:00:00Z", "to": "2026-01-10T10:00:00Z", "revived": "1", "expired": "0",
		}},
		{Action: audit.KeyRevoke, Actor: "uid:7", Target: w.ids["meanwhile, for an hour"]},
	}
	if diff := cmp.Diff(wantEvents, w.store.TakeEvents()); diff != "" {
		t.Error(diff)
	}
	after := map[string]bool{
		"before, forever": true, "before, for an hour": true, "before, for a week": true, "before, rotated meanwhile": true,
		"grace's successor": true, "meanwhile, forever": true, "meanwhile, the same name": true, "rotated meanwhile": true,
	}
	check := func(when string) {
		t.Helper()
		if diff := cmp.Diff(after, w.live()); diff != "" {
			t.Errorf("%s: %s", when, diff)
		}
		if w.i.ClockBehind() != 0 || !w.i.Now().Equal(w.clock.now()) {
			t.Errorf("%s: the time is %s, want %s", when, w.i.Now(), w.clock.now())
		}
	}
	check("after AcceptClock")
	w.i.saveUsage()
	w.i, w.v = openWith(t, w.opts)
	check("after a restart")
	if got, err := w.i.AcceptClock(t.Context(), false, 7); err != nil || !got.From.Equal(got.To) || w.store.Events() != nil {
		t.Errorf("a second AcceptClock returns %+v, %v and logs %v", got, err, w.store.Events())
	}
	// Another key was given the name of the key that is valid again.
	if k, err := w.i.Find("hour"); err != nil || k.ID != w.ids["meanwhile, the same name"] {
		t.Errorf("the holder of the name is %+v, %v", k, err)
	}
	// The grace period that began in the wrong time still lasts two hours.
	w.clock.pass(time.Hour)
	delete(after, "before, for an hour")
	check("an hour later")
	w.clock.pass(time.Hour)
	delete(after, "before, rotated meanwhile")
	check("two hours later")
}

// If the clock was set forward, AcceptClock accepts the new time at once.
func TestAcceptClockThatIsAhead(t *testing.T) {
	t.Parallel()
	_, i, v, clock := newClocked(t)
	token, _ := issue(t, i, IssueRequest{Expire: "1h"})
	other, _ := issue(t, i, IssueRequest{Expire: "1w"})
	bound, cancel := accepted(t, v, token).Bind(t.Context())
	defer cancel()
	clock.set(clock.now().Add(24 * time.Hour))
	accepted(t, v, token)
	got, err := i.AcceptClock(t.Context(), false, 0)
	if want := (ClockChange{From: clock.now().Add(-24 * time.Hour), To: clock.now(), Expired: 1}); err != nil || got != want {
		t.Errorf("AcceptClock returns %+v, %v, want %+v", got, err, want)
	}
	canceledByRefusal(t, bound)
	refused(t, v, token)
	accepted(t, v, other)
	if ahead, _ := i.ClockAhead(); ahead != 0 {
		t.Errorf("the clock is %s ahead", ahead)
	}
}

// Keys and tombstones with times in the future do not set the clock forward again when a backup is restored.
func TestRestoreAfterAcceptClock(t *testing.T) {
	t.Parallel()
	w := newWrongClock(t)
	if _, err := w.i.Prune(t.Context(), "", false, 0); err != nil {
		t.Fatal(err)
	}
	early := snapshot(t, w.i)
	if _, err := w.i.AcceptClock(t.Context(), false, 0); err != nil {
		t.Fatal(err)
	}
	before := w.live()
	for _, b := range []struct {
		when   string
		backup backup
	}{{"while the clock was ahead", early}, {"now", snapshot(t, w.i)}} {
		restore(t, w.i, b.backup)
		if w.i.ClockBehind() != 0 || !w.i.Now().Equal(w.clock.now()) {
			t.Errorf("after the restore of a backup made %s, the time is %s, want %s", b.when, w.i.Now(), w.clock.now())
		}
		if diff := cmp.Diff(before, w.live()); diff != "" {
			t.Errorf("after the restore of a backup made %s: %s", b.when, diff)
		}
	}
}

// Prune drops the oldest tombstones first. Those from the time in which the clock was ahead are not younger than later ones.
func TestTombstonesAfterAcceptClock(t *testing.T) {
	t.Parallel()
	w := newWrongClock(t)
	if _, err := w.i.Prune(t.Context(), "", false, 0); err != nil {
		t.Fatal(err)
	}
	want := len(w.i.keys.tombstones())
	got, err := w.i.AcceptClock(t.Context(), false, 0)
	if err != nil || got.Revived != 0 || got.Expired != 0 || got.Revoked != 1 {
		t.Errorf("AcceptClock returns %+v, %v, want tombstones not to count", got, err)
	}
	check := func(when string) {
		t.Helper()
		tombstones := w.i.keys.tombstones()
		if len(tombstones) != want || want == 0 {
			t.Errorf("%s, there are %d tombstones, want %d", when, len(tombstones), want)
		}
		for _, r := range tombstones {
			if r.RevokedAt.After(w.right) {
				t.Errorf("%s, a tombstone is from %s, which has not come yet", when, r.RevokedAt)
			}
		}
	}
	check("after AcceptClock")
	w.i, w.v = openWith(t, w.opts)
	check("after a restart")
}
