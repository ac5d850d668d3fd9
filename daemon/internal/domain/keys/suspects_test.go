package keys

import (
	"crypto/ed25519"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/audit"
)

// thief returns a function that signs any payload with the server's signing key, as somebody who stole it could.
func thief(t testing.TB, i *Issuer) func(payload []byte) string {
	ring := i.keyring.Load()
	return func(payload []byte) string {
		token, err := sign(ed25519.PrivateKey(ring.private.Reveal()), payload, []byte(ring.footer))
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
}

func TestSuspectsAreLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, i, v := newIssuer(t)
		ring, mint := i.keyring.Load(), thief(t, i)
		payload := func(r Record) []byte {
			p, err := ring.payload(r)
			if err != nil {
				t.Fatal(err)
			}
			return p
		}
		goodToken, good := issue(t, i, IssueRequest{Namespaces: []string{"a"}})
		revokedToken, revoked := issue(t, i, IssueRequest{})
		expiredToken, _ := issue(t, i, IssueRequest{Expire: "1h"})
		prunedToken, pruned := issue(t, i, IssueRequest{Expire: "1h"})
		resetToken := func() string {
			_, other, _ := newIssuer(t)
			token, _ := issue(t, other, IssueRequest{})
			return token
		}()
		revoke(t, i, revoked.ID)
		time.Sleep(time.Hour)
		i.keys.remove(pruned.ID)
		store.TakeEvents()
		stop := run(t, i)
		defer stop()

		// Tokens that are refused for ordinary reasons are not reported.
		accepted(t, v, goodToken)
		for _, token := range []string{revokedToken, expiredToken, prunedToken, resetToken, goodToken[:len(goodToken)-1], "x"} {
			refused(t, v, token)
		}
		synctest.Wait()
		if events := store.TakeEvents(); events != nil {
			t.Errorf("ordinary refusals were logged: %+v", events)
		}

		wider, changed := good, revoked
		wider.Namespaces = nil
		changed.Scopes = []Scope{ScopeExec}
		minted := Record{ID: randomID(), CreatedAt: good.CreatedAt}
		earlier := Record{ID: randomID(), CreatedAt: good.CreatedAt, SigningKeyID: "another"}
		i.keys.put(earlier)
		for _, token := range []string{
			mint(payload(wider)), mint(payload(minted)), mint(payload(changed)), mint(payload(earlier)), mint([]byte("{}")),
			mint(payload(wider)), mint(payload(minted)), mint([]byte("[]")), // key ids that were already seen
		} {
			refused(t, v, token)
		}
		synctest.Wait()
		event := func(target, cause string) audit.Event {
			return audit.Event{Action: audit.KeySuspect, Actor: audit.ActorServer, Target: target, Detail: map[string]string{
				"cause": cause, "from": "192.0.2.1",
			}}
		}
		want := []audit.Event{
			event(good.ID, causeOther), event(minted.ID, causeUnknown), event(revoked.ID, causeMismatch),
			event(earlier.ID, causeMismatch), event("", causeClaims),
		}
		if diff := cmp.Diff(want, store.TakeEvents()); diff != "" {
			t.Error(diff)
		}
		accepted(t, v, goodToken)

		// In the next interval, the same key id is reported again.
		time.Sleep(suspectInterval)
		refused(t, v, mint(payload(minted)))
		synctest.Wait()
		if diff := cmp.Diff([]audit.Event{event(minted.ID, causeUnknown)}, store.TakeEvents()); diff != "" {
			t.Error(diff)
		}
	})
}

// However many tokens a thief uses, the audit log grows only by a limited number of entries a minute. A further entry
// says how many tokens were left out. If the log cannot be written for some time, none of these entries is lost.
func TestSuspectsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, i, v := newIssuer(t)
		ring, mint := i.keyring.Load(), thief(t, i)
		flood := func(n int) {
			for range n {
				payload, err := ring.payload(Record{ID: randomID()})
				if err != nil {
					t.Fatal(err)
				}
				refused(t, v, mint(payload))
			}
		}
		checks := countChecks(v)
		stop := run(t, i)
		store.FailWith(errDisk)
		flood(10)
		synctest.Wait()
		const floods = 20
		for range floods {
			time.Sleep(time.Second)
			flood(200)
		}
		synctest.Wait()
		if n, most := checks.Load(), int64(suspectChecksBurst+floods*suspectChecksPerSecond); n > most {
			t.Errorf("%d signatures of refused tokens were checked, want at most %d", n, most)
		}
		if events := store.TakeEvents(); events != nil {
			t.Errorf("a failing store has %d entries", len(events))
		}
		store.FailWith(nil)
		skipped := checks.Load() - maxSuspects
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if events := store.TakeEvents(); len(events) != maxSuspects {
			t.Errorf("a flood of tokens caused %d entries, want %d", len(events), maxSuspects)
		}
		flood(1)
		stop() // writes the pending events
		events := store.TakeEvents()
		if len(events) != 2 || events[0].Detail["count"] != strconv.FormatInt(skipped, 10) {
			t.Errorf("after the flood: %+v", events)
		}
	})
}
