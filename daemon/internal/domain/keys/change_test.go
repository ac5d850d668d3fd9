package keys

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/audit"
)

// newClocked is like newIssuer, but the issuer uses the returned clock.
func newClocked(t testing.TB) (Memory, *Issuer, *Verifier, *manualClock) {
	t.Helper()
	store, clock := NewMemory(), newManualClock("2026-01-10T10:00:00Z")
	opts := options(store, keyringPath(t))
	opts.readClock, opts.asleep = clock.read, clock.slept
	i, v := openWith(t, opts)
	return store, i, v, clock
}

func TestRevoke(t *testing.T) {
	t.Parallel()
	store, i, v, clock := newClocked(t)
	token, r := issue(t, i, IssueRequest{Name: "ci", Expire: "1h"})
	accepted(t, v, token)
	store.TakeEvents()

	store.FailWith(errDisk)
	if _, err := i.Revoke(context.Background(), "ci", 7); !errors.Is(err, errDisk) {
		t.Errorf("Revoke with a failing store: %v", err)
	}
	store.FailWith(nil)
	accepted(t, v, token) // a change that cannot be stored and logged has no effect

	clock.pass(time.Minute)
	k, err := i.Revoke(context.Background(), "ci", 7)
	if err != nil || k.ID != r.ID || !k.RevokedAt.Equal(clock.now()) || k.Revocation != ByHand || k.Requests != 2 {
		t.Errorf("Revoke: %+v, %v", k, err)
	}
	if cause := refused(t, v, token); !strings.Contains(cause, causeRevoked) || !strings.Contains(cause, r.ID) {
		t.Errorf("the logged cause is %q", cause)
	}
	if diff := cmp.Diff(k.Record, store.Records()[r.ID]); diff != "" {
		t.Error(diff)
	}
	want := []audit.Event{{Action: audit.KeyRevoke, Actor: "uid:7", Target: r.ID, Detail: map[string]string{"name": "ci"}}}
	if diff := cmp.Diff(want, store.TakeEvents()); diff != "" {
		t.Error(diff)
	}

	clock.pass(time.Hour)
	if again, err := i.Revoke(context.Background(), r.ID, 8); err != nil || !cmp.Equal(again.Record, k.Record) {
		t.Errorf("second Revoke: %+v, %v", again, err)
	}
	if events := store.TakeEvents(); events != nil {
		t.Errorf("second Revoke logged %+v", events)
	}
	if _, err := i.Revoke(context.Background(), "nobody", 7); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown key: %v", err)
	}
	_, expired := issue(t, i, IssueRequest{Expire: "1s"})
	clock.pass(time.Hour)
	if k, err := i.Revoke(context.Background(), expired.ID, 7); err != nil || k.StateAt(clock.now()) != Revoked {
		t.Errorf("an expired key: %+v, %v", k, err)
	}
}

// A key in its grace period can be revoked before the grace period ends.
func TestRevokeEndsAGracePeriod(t *testing.T) {
	t.Parallel()
	_, i, v, clock := newClocked(t)
	token, r := issue(t, i, IssueRequest{})
	if _, _, _, err := i.Rotate(context.Background(), RotateRequest{Ref: r.ID, Grace: "1h"}); err != nil {
		t.Fatal(err)
	}
	clock.pass(time.Minute)
	accepted(t, v, token)
	if k := revoke(t, i, r.ID); k.Revocation != ByHand || !k.RevokedAt.Equal(clock.now()) || k.ReplacedBy == "" {
		t.Errorf("the key is %+v", k)
	}
	refused(t, v, token)
}

func TestRotate(t *testing.T) {
	t.Parallel()
	store, i, v, clock := newClocked(t)
	oldToken, old := issue(t, i, IssueRequest{
		Name: "ci", Expire: "1mo", Namespaces: []string{"a", "b"}, Scopes: []Scope{ScopeExec}, CreatedBy: 1,
	})
	accepted(t, v, oldToken)
	clock.pass(24 * time.Hour)
	store.TakeEvents()

	secret, made, replaced, err := i.Rotate(context.Background(), RotateRequest{Ref: "ci", Grace: "2h", By: 7})
	if err != nil {
		t.Fatal(err)
	}
	want := Record{
		ID: made.ID, Name: "ci", Namespaces: []string{"a", "b"}, Scopes: []Scope{ScopeExec}, CreatedAt: clock.now(), CreatedBy: 7,
		Life: "1mo", ExpiresAt: clock.now().AddDate(0, 1, 0), SigningKeyID: old.SigningKeyID,
	}
	if diff := cmp.Diff(want, made); diff != "" || made.ID == old.ID {
		t.Error(diff)
	}
	wantOld := old
	wantOld.RevokedAt, wantOld.Revocation, wantOld.ReplacedBy = clock.now().Add(2*time.Hour), ByRotation, made.ID
	if diff := cmp.Diff(wantOld, replaced.Record); diff != "" || replaced.Requests != 1 {
		t.Error(replaced.Requests, diff)
	}
	for _, r := range []Record{want, wantOld} {
		if diff := cmp.Diff(r, store.Records()[r.ID]); diff != "" {
			t.Error(diff)
		}
	}
	events := store.TakeEvents()
	wantEvents := []audit.Event{createEvent(want), {
		Action: audit.KeyRotate, Actor: "uid:7", Target: old.ID, Detail: map[string]string{
			"name": "ci", "replaced_by": made.ID, "accepted_until": "2026-01-11T12:00:00Z",
		},
	}}
	if diff := cmp.Diff(wantEvents, events); diff != "" {
		t.Error(diff)
	}
	if k, err := i.Find("ci"); err != nil || k.ID != made.ID {
		t.Errorf("Find returns %+v, %v, want the new key", k, err)
	}
	clock.pass(2*time.Hour - time.Millisecond)
	accepted(t, v, oldToken)
	accepted(t, v, secret.Reveal())
	clock.pass(time.Millisecond)
	refused(t, v, oldToken)
	accepted(t, v, secret.Reveal())
}

func TestRotateLife(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for name, tt := range map[string]struct {
		life, expire string
		// schema1 removes the Life of the old key, because the first release did not store it.
		schema1  bool
		wantLife string
		want     string
	}{
		"same expiry":           {life: "3mo", wantLife: "3mo", want: "2026-05-09T10:00:00Z"},
		"no expiry":             {},
		"other expiry":          {life: "3mo", expire: "1d", wantLife: "1d", want: "2026-02-10T10:00:00Z"},
		"same expiry, schema 1": {life: "1mo", schema1: true, wantLife: "2678400s", want: "2026-03-12T10:00:00Z"},
		"no expiry, schema 1":   {schema1: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, i, _, clock := newClocked(t)
			_, r := issue(t, i, IssueRequest{Expire: tt.life})
			if tt.schema1 {
				r.Life = ""
				i.keys.put(r)
			}
			clock.pass(30 * 24 * time.Hour)
			_, made, _, err := i.Rotate(ctx, RotateRequest{Ref: r.ID, Expire: tt.expire})
			if err != nil || made.Life != tt.wantLife {
				t.Fatalf("the new key is %+v, %v", made, err)
			}
			if tt.want == "" {
				if !made.ExpiresAt.IsZero() {
					t.Errorf("it expires at %s", made.ExpiresAt)
				}
				return
			}
			if got := made.ExpiresAt.Format(time.RFC3339); got != tt.want {
				t.Errorf("it expires at %s, want %s", got, tt.want)
			}
		})
	}
}

func TestRotateRefuses(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	store, i, v, clock := newClocked(t)
	token, live := issue(t, i, IssueRequest{Name: "live"})
	_, expired := issue(t, i, IssueRequest{Expire: "1h"})
	_, revoked := issue(t, i, IssueRequest{})
	_, rotated := issue(t, i, IssueRequest{})
	_, next, _, err := i.Rotate(ctx, RotateRequest{Ref: rotated.ID, Grace: "1d"})
	if err != nil {
		t.Fatal(err)
	}
	revoke(t, i, revoked.ID)
	clock.pass(time.Hour)
	before := i.Counts()
	store.TakeEvents()
	for _, tt := range []struct {
		req  RotateRequest
		is   func(error) bool
		want string
	}{
		{RotateRequest{Ref: expired.ID}, errdefs.IsFailedPrecondition, "has expired: create a new one"},
		{RotateRequest{Ref: revoked.ID}, errdefs.IsFailedPrecondition, "is revoked: create a new one"},
		{RotateRequest{Ref: rotated.ID}, errdefs.IsFailedPrecondition, "rotate the one that replaced it, " + next.ID},
		{RotateRequest{Ref: "nobody"}, errdefs.IsNotFound, "nobody"},
		{RotateRequest{Ref: live.ID, Grace: "1"}, errdefs.IsInvalidArgument, `grace period "1": "1" has no unit`},
		{RotateRequest{Ref: live.ID, Grace: "9999y"}, errdefs.IsInvalidArgument, `grace period "9999y": is after the year 9999: `},
		{RotateRequest{Ref: live.ID, Expire: "x"}, errdefs.IsInvalidArgument, "put a number"},
	} {
		secret, made, old, err := i.Rotate(ctx, tt.req)
		if !tt.is(err) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Rotate(%+v): %v, want %q", tt.req, err, tt.want)
		}
		if secret.Reveal() != "" || made.ID != "" || old.ID != "" {
			t.Errorf("Rotate(%+v) returns a key with its error", tt.req)
		}
	}
	store.FailWith(errDisk)
	if secret, _, _, err := i.Rotate(ctx, RotateRequest{Ref: "live"}); !errors.Is(err, errDisk) || secret.Reveal() != "" {
		t.Errorf("Rotate with a failing store: %v", err)
	}
	accepted(t, v, token)
	if after := i.Counts(); after != before || store.TakeEvents() != nil {
		t.Errorf("counts were %+v and are %+v", before, after)
	}
}

func TestPrune(t *testing.T) {
	t.Parallel()
	store, i, v, clock := newClocked(t)
	ctx := context.Background()
	liveToken, live := issue(t, i, IssueRequest{Name: "live"})
	_, early := issue(t, i, IssueRequest{Expire: "1d", Name: "early"})
	_, revoked := issue(t, i, IssueRequest{})
	clock.pass(31 * 24 * time.Hour)
	revoke(t, i, revoked.ID)
	_, grace := issue(t, i, IssueRequest{})
	if _, _, _, err := i.Rotate(ctx, RotateRequest{Ref: grace.ID, Grace: "1d"}); err != nil {
		t.Fatal(err)
	}
	clock.pass(time.Hour)
	store.TakeEvents()
	accepted(t, v, liveToken)
	prune := func(deadFor string, dryRun bool) (ids []string) {
		t.Helper()
		dead, err := i.Prune(ctx, deadFor, dryRun, 7)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range dead {
			ids = append(ids, k.ID)
		}
		return ids
	}
	both := []string{early.ID, revoked.ID}
	slices.SortFunc(both, func(a, b string) int {
		return strings.Compare(i.keys.byID[a].position().String(), i.keys.byID[b].position().String())
	})
	before := i.Counts()
	if got := prune("", true); !cmp.Equal(got, both) || i.Counts() != before || store.TakeEvents() != nil {
		t.Errorf("a dry run returns %q, want %q, and the counts are %+v", got, both, i.Counts())
	}
	if got := prune("31d", false); got != nil {
		t.Errorf("dead for 31 days: %q", got)
	}
	if _, err := i.Prune(ctx, "1", false, 7); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad age: %v", err)
	}
	store.FailWith(errDisk)
	if _, err := i.Prune(ctx, "", false, 7); !errors.Is(err, errDisk) || i.Counts() != before {
		t.Errorf("with a failing store: %v, %+v", err, i.Counts())
	}
	store.FailWith(nil)
	if got := prune("30d", false); !cmp.Equal(got, []string{early.ID}) {
		t.Errorf("dead for 30 days: %q, want %q", got, early.ID)
	}
	want := []audit.Event{{Action: audit.KeyPrune, Actor: "uid:7", Target: early.ID, Detail: map[string]string{"name": "early"}}}
	if diff := cmp.Diff(want, store.TakeEvents()); diff != "" {
		t.Error(diff)
	}
	if r, ok := store.Records()[early.ID]; ok {
		t.Errorf("the store still has the pruned key, which has expired: %+v", r)
	}
	for _, ref := range []string{early.ID, "early", early.ID[:6]} {
		if k, err := i.Find(ref); !errdefs.IsNotFound(err) {
			t.Errorf("Find(%q): %+v, %v", ref, k, err)
		}
	}
	if got := prune("", false); !cmp.Equal(got, []string{revoked.ID}) {
		t.Errorf("with an empty age: %q", got)
	}
	clock.pass(24 * time.Hour)
	if got := prune("", false); !cmp.Equal(got, []string{grace.ID}) {
		t.Errorf("after the grace period: %q", got)
	}
	accepted(t, v, liveToken)
	if k, err := i.Find("live"); err != nil || k.ID != live.ID || i.Counts() != (Counts{Live: 2}) {
		t.Errorf("the live key: %+v, %v; counts are %+v", k, err, i.Counts())
	}
}

// A client that still uses a key that was revoked and pruned is refused without an alarm, also after a restart and after
// the restore of any backup with the same signing key. A reset forgets the key.
func TestPrunedKeysStayKnown(t *testing.T) {
	t.Parallel()
	store, path := NewMemory(), keyringPath(t)
	i, v := openIssuer(t, store, path)
	token, r := issue(t, i, IssueRequest{Name: "secret-name", Namespaces: []string{"secret-namespace"}, Expire: "1y"})
	rotatedToken, rotated := issue(t, i, IssueRequest{})
	live, _ := issue(t, i, IssueRequest{})
	accepted(t, v, token)
	early := snapshot(t, i)
	revoke(t, i, r.ID)
	if _, _, _, err := i.Rotate(t.Context(), RotateRequest{Ref: rotated.ID}); err != nil {
		t.Fatal(err)
	}
	i.saveUsage()
	revoked := snapshot(t, i)
	for n := range revoked.records { // the prune comes later
		if r := &revoked.records[n]; !r.RevokedAt.IsZero() {
			r.RevokedAt = r.RevokedAt.Add(-time.Second)
		}
	}
	if dead, err := i.Prune(t.Context(), "", false, 0); err != nil || len(dead) != 2 {
		t.Fatalf("Prune returns %d keys, %v", len(dead), err)
	}
	check := func(when string) {
		t.Helper()
		accepted(t, v, live)
		for _, token := range []string{token, rotatedToken} {
			if cause := refused(t, v, token); !strings.Contains(cause, causePruned) {
				t.Errorf("%s: the logged cause is %q", when, cause)
			}
		}
		if events := i.suspects.take(); events != nil {
			t.Errorf("%s: alarms: %+v", when, events)
		}
		if k, err := i.Find(r.ID); !errdefs.IsNotFound(err) {
			t.Errorf("%s: the pruned key is found: %+v", when, k)
		}
		if n := len(i.keys.records()); n != 2 || i.Counts() != (Counts{Live: 2}) {
			t.Errorf("%s: there are %d records, counts are %+v", when, n, i.Counts())
		}
		kept := store.Records()[r.ID]
		want := Record{ID: r.ID, CreatedAt: r.CreatedAt, ExpiresAt: r.ExpiresAt, SigningKeyID: r.SigningKeyID, RevokedAt: kept.RevokedAt, Revocation: Pruned}
		if diff := cmp.Diff(want, kept); diff != "" {
			t.Errorf("%s: the store has another tombstone: %s", when, diff)
		}
	}
	check("after the prune")
	if usage, _ := store.Used(); usage[r.ID].Requests != 0 {
		t.Error("the store still has the usage of the pruned key")
	}
	i, v = openIssuer(t, store, path)
	check("after a restart")
	restore(t, i, early)
	check("after a restore of a backup in which the keys are live")
	restore(t, i, revoked)
	check("after a restore of a backup in which the keys are revoked")
	late := snapshot(t, i)
	late.records = slices.Collect(maps.Values(store.Records())) // as in a file of the store

	// On another server, too, the backup keeps the keys refused, even if that server still has them.
	store, path = NewMemory(), keyringPath(t)
	i, v = openIssuer(t, store, path)
	restore(t, i, late)
	check("on another server")
	store, path = NewMemory(), keyringPath(t)
	i, v = openIssuer(t, store, path)
	restore(t, i, early)
	accepted(t, v, token)
	restore(t, i, late)
	check("on a server that still had the keys")
	store, path = NewMemory(), keyringPath(t)
	i, v = openIssuer(t, store, path)
	restore(t, i, revoked)
	restore(t, i, late)
	check("on a server on which the keys were only revoked")

	reset(t, i)
	if len(i.keys.tombstones()) != 0 {
		t.Error("after a reset, there are tombstones")
	}
	for id, r := range store.Records() {
		if r.Revocation == Pruned {
			t.Errorf("after a reset, the store has a tombstone of %s", id)
		}
	}
	refused(t, v, token)
}

// The number of tombstones is bounded. Those of keys that have expired in the meantime are dropped first.
func TestTombstonesAreBounded(t *testing.T) {
	t.Parallel()
	store, i, v, clock := newClocked(t)
	expiring, r := issue(t, i, IssueRequest{Expire: "1h"})
	revoke(t, i, r.ID)
	prune := func() {
		t.Helper()
		if _, err := i.Prune(t.Context(), "", false, 0); err != nil {
			t.Fatal(err)
		}
	}
	prune()
	clock.pass(time.Hour)
	old, r := issue(t, i, IssueRequest{})
	revoke(t, i, r.ID)
	prune()
	if _, ok := store.Records()[r.ID]; !ok || len(store.Records()) != 1 {
		t.Errorf("the store has %d tombstones, want only that of the key that does not expire", len(store.Records()))
	}
	refused(t, v, expiring)
	clock.pass(time.Minute)
	dead := make([]Record, maxTombstones)
	for n := range dead {
		dead[n] = Record{ID: randomID(), CreatedAt: clock.now(), SigningKeyID: r.SigningKeyID, RevokedAt: clock.now(), Revocation: ByHand}
	}
	if err := i.commit(Change{Put: dead}); err != nil {
		t.Fatal(err)
	}
	prune()
	if n := len(i.keys.tombstones()); n != maxTombstones || len(store.Records()) != maxTombstones {
		t.Errorf("there are %d tombstones, want %d", n, maxTombstones)
	}
	if cause := refused(t, v, old); !strings.Contains(cause, causeUnknown) {
		t.Errorf("the logged cause for the oldest pruned key is %q", cause)
	}
}
