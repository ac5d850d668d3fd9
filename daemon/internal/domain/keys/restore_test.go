package keys

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/audit"
)

type backup struct {
	keyring Secret
	records []Record
}

func snapshot(t testing.TB, i *Issuer) (b backup) {
	t.Helper()
	err := i.Snapshot(func(keyring Secret) error {
		b = backup{keyring, i.keys.records()}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func restore(t testing.TB, i *Issuer, b backup) (live, invalidated int) {
	t.Helper()
	live, invalidated, err := i.Restore(context.Background(), b.keyring, b.records, 7)
	if err != nil {
		t.Fatal(err)
	}
	return live, invalidated
}

func TestSnapshot(t *testing.T) {
	t.Parallel()
	path := keyringPath(t)
	i, _ := openIssuer(t, NewMemory(), path)
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if b := snapshot(t, i); b.keyring.Reveal() != string(file) {
		t.Error("the snapshot differs from the keyring file")
	}
	if err := i.Snapshot(func(Secret) error { return errDisk }); !errors.Is(err, errDisk) {
		t.Errorf("Snapshot: %v", err)
	}
	// While a snapshot is taken, no key can be created, but the methods that change nothing do not block.
	issued := make(chan error, 1)
	err = i.Snapshot(func(Secret) error {
		go func() {
			_, _, err := i.Issue(context.Background(), IssueRequest{})
			issued <- err
		}()
		i.SigningKey()
		_, _, err := i.List(Filter{}, "", 1)
		if c := i.Counts(); c != (Counts{}) {
			t.Errorf("a key was created during the snapshot: %+v", c)
		}
		return err
	})
	if err := errors.Join(err, <-issued); err != nil {
		t.Error(err)
	}
}

// After a restore on a new server, the keys of the old server are accepted again.
func TestRestoreOnNewServer(t *testing.T) {
	t.Parallel()
	_, old, _ := newIssuer(t)
	live, r := issue(t, old, IssueRequest{Name: "ci", Expire: "1y", Scopes: []Scope{ScopeRead}})
	dead, gone := issue(t, old, IssueRequest{})
	revoke(t, old, gone.ID)
	b := snapshot(t, old)

	store, path := NewMemory(), keyringPath(t)
	i, v := openIssuer(t, store, path)
	own, _ := issue(t, i, IssueRequest{Name: "ci"})
	accepted(t, v, own)
	store.TakeEvents()
	if live, invalidated := restore(t, i, b); live != 1 || invalidated != 1 {
		t.Errorf("%d keys are live, %d invalidated", live, invalidated)
	}
	want := []audit.Event{
		{Action: audit.ServerRestore, Actor: "uid:7", Target: old.SigningKey().ID, Detail: map[string]string{"keys": "2"}},
		{Action: audit.KeysInvalid, Actor: "uid:7", Target: old.SigningKey().ID, Detail: map[string]string{"count": "1"}},
	}
	if diff := cmp.Diff(want, store.TakeEvents()); diff != "" {
		t.Error(diff)
	}
	check := func(i *Issuer, v *Verifier) {
		t.Helper()
		if p := accepted(t, v, live); p.KeyID != r.ID || !p.Has(ScopeRead) || p.Has(ScopeExec) {
			t.Errorf("the principal of the restored key is %+v", p)
		}
		refused(t, v, dead)
		refused(t, v, own)
		if k, err := i.Find("ci"); err != nil || k.ID != r.ID {
			t.Errorf("the key ci is %+v, %v", k, err)
		}
		if i.SigningKey() != old.SigningKey() {
			t.Errorf("the signing key is %+v", i.SigningKey())
		}
		if c := i.Counts(); c != (Counts{Live: 1, Revoked: 2}) {
			t.Errorf("counts are %+v", c)
		}
	}
	check(i, v)
	check(openIssuer(t, store, path))
	records := store.Records()
	if live, invalidated := restore(t, i, b); live != 1 || invalidated != 0 || !cmp.Equal(records, store.Records()) {
		t.Errorf("second restore: %d live, %d invalidated\n%s", live, invalidated, cmp.Diff(records, store.Records()))
	}
	check(i, v)
	fresh, _ := issue(t, i, IssueRequest{})
	accepted(t, v, fresh)
}

// If the signing key is the same, keys that were created, revoked or rotated since the backup stay so.
func TestRestoreKeepsWhatIsKnown(t *testing.T) {
	t.Parallel()
	_, i, v, clock := newClocked(t)
	ctx := context.Background()
	stays, _ := issue(t, i, IssueRequest{Name: "stays"})
	revokedSince, a := issue(t, i, IssueRequest{})
	rotatedSince, b := issue(t, i, IssueRequest{Name: "rotated"})
	rotatedBefore, c := issue(t, i, IssueRequest{})
	movedName, d := issue(t, i, IssueRequest{Name: "moved"})
	if _, _, _, err := i.Rotate(ctx, RotateRequest{Ref: c.ID, Grace: "3h"}); err != nil {
		t.Fatal(err)
	}
	bound, cancel := accepted(t, v, stays).Bind(ctx)
	defer cancel()
	taken := snapshot(t, i)

	revoke(t, i, a.ID)
	next, _, _, err := i.Rotate(ctx, RotateRequest{Ref: b.ID, Grace: "1h"})
	if err != nil {
		t.Fatal(err)
	}
	i.keys.remove(d.ID) // as if this server had never had the key
	since, e := issue(t, i, IssueRequest{Name: "moved"})

	if live, invalidated := restore(t, i, taken); live != 5 || invalidated != 0 {
		t.Errorf("%d live, %d invalidated", live, invalidated)
	}
	for _, token := range []string{stays, rotatedSince, rotatedBefore, next.Reveal(), movedName, since} {
		accepted(t, v, token)
	}
	refused(t, v, revokedSince)
	if bound.Err() != nil {
		t.Errorf("the context of a key that stays live was canceled: %v", context.Cause(bound))
	}
	if k, err := i.Find("moved"); err != nil || k.ID != d.ID {
		t.Errorf("the key moved is %+v, %v, want the one from the backup", k, err)
	}
	if k, err := i.Find(e.ID); err != nil || k.Name != "" {
		t.Errorf("the key that was created since is %+v, %v, want one without a name", k, err)
	}
	clock.pass(time.Hour)
	refused(t, v, rotatedSince)
	accepted(t, v, rotatedBefore)
	clock.pass(2 * time.Hour)
	refused(t, v, rotatedBefore)
	accepted(t, v, next.Reveal())
}

// A restore undoes a reset, but not the expiry, revocation or rotation of a key. A second restore, of another backup,
// undoes the first one in the same way.
func TestRestoreUndoesAReset(t *testing.T) {
	t.Parallel()
	_, i, v, clock := newClocked(t)
	ctx := context.Background()
	first, _ := issue(t, i, IssueRequest{Name: "first"})
	revokedBefore, a := issue(t, i, IssueRequest{})
	revokedSince, b := issue(t, i, IssueRequest{})
	expires, _ := issue(t, i, IssueRequest{Expire: "1h"})
	rotated, d := issue(t, i, IssueRequest{})
	if _, _, _, err := i.Rotate(ctx, RotateRequest{Ref: d.ID, Grace: "1d"}); err != nil {
		t.Fatal(err)
	}
	b1 := snapshot(t, i)
	revoke(t, i, a.ID)
	reset(t, i)
	revoke(t, i, b.ID) // makes the revocation by the reset permanent
	second, _ := issue(t, i, IssueRequest{Name: "second"})
	b2 := snapshot(t, i)
	clock.pass(time.Hour)

	if live, invalidated := restore(t, i, b1); live != 2 || invalidated != 1 { // live: first and the key that replaced d
		t.Errorf("first backup: %d live, %d invalidated", live, invalidated)
	}
	accepted(t, v, first)
	for _, token := range []string{revokedBefore, revokedSince, expires, rotated, second} {
		refused(t, v, token)
	}
	if live, invalidated := restore(t, i, b2); live != 1 || invalidated != 2 {
		t.Errorf("second backup: %d live, %d invalidated", live, invalidated)
	}
	accepted(t, v, second)
	refused(t, v, first)
}

// An interrupted restore may have left keys of the current signing key marked as revoked by a reset. Restoring them
// makes them live again.
func TestRestoreOfKeysMarkedAsReset(t *testing.T) {
	t.Parallel()
	_, i, v := newIssuer(t)
	token, _ := issue(t, i, IssueRequest{})
	b := snapshot(t, i)
	b.records[0] = b.records[0].invalidated(b.records[0].CreatedAt)
	if live, invalidated := restore(t, i, b); live != 1 || invalidated != 0 {
		t.Errorf("%d live, %d invalidated", live, invalidated)
	}
	accepted(t, v, token)
}

// A restore advances the clock to the latest time in the backup, so that keys that expired before the backup stay
// expired even if the clock of this server is behind.
func TestRestoreAdvancesTheClock(t *testing.T) {
	t.Parallel()
	_, old, _, clock := newClocked(t)
	token, _ := issue(t, old, IssueRequest{Expire: "1d"})
	clock.pass(48 * time.Hour)
	issue(t, old, IssueRequest{})
	_, i, v, _ := newClocked(t)
	restore(t, i, snapshot(t, old))
	refused(t, v, token)
	if i.ClockBehind() != 48*time.Hour {
		t.Errorf("the clock is %s behind", i.ClockBehind())
	}
}

// A token that is being verified is still accepted after a concurrent restore of the same signing key, but not after a
// concurrent reset.
func TestRestoreDuringFirstRequest(t *testing.T) {
	t.Parallel()
	_, i, v := newIssuer(t)
	_, r := issue(t, i, IssueRequest{})
	id := v.keys.trusted()
	payload, err := id.payload(r)
	if err != nil {
		t.Fatal(err)
	}
	restore(t, i, snapshot(t, i))
	if p, refused := v.admit(id, "token", payload, v.clock.now(), from); refused != nil || p.KeyID != r.ID {
		t.Errorf("after a restore, the principal is %+v, %v", p, refused)
	}
	reset(t, i)
	if p, refused := v.admit(id, "token", payload, v.clock.now(), from); refused == nil || p.KeyID != "" {
		t.Errorf("after a reset, the token is accepted: %+v", p)
	}
}

func TestRestoreRefusesABadBackup(t *testing.T) {
	t.Parallel()
	store, i, v := newIssuer(t)
	token, _ := issue(t, i, IssueRequest{})
	good := snapshot(t, i)
	store.TakeEvents()
	with := func(change func(*Record)) []Record {
		records := slices.Clone(good.records)
		change(&records[0])
		return records
	}
	for name, b := range map[string]backup{
		"no keyring":     {NewSecret(""), good.records},
		"not a keyring":  {NewSecret("{}"), good.records},
		"same key twice": {good.keyring, append(slices.Clone(good.records), good.records...)},
		"no id":          {good.keyring, with(func(r *Record) { r.ID = "" })},
		"not an id":      {good.keyring, with(func(r *Record) { r.ID = "../../etc/passwd" })},
		"no signing key": {good.keyring, with(func(r *Record) { r.SigningKeyID = "" })},
		"no time":        {good.keyring, with(func(r *Record) { r.CreatedAt = time.Time{} })},
	} {
		if _, _, err := i.Restore(context.Background(), b.keyring, b.records, 7); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := i.Restore(ctx, good.keyring, good.records, 7); !errors.Is(err, context.Canceled) {
		t.Errorf("Restore with a canceled context: %v", err)
	}
	accepted(t, v, token)
	if events := store.TakeEvents(); events != nil {
		t.Errorf("failed restores logged %+v", events)
	}
}

// If a restore fails at any step, the accepted keys are either the old ones, the restored ones, or fewer. Repeating the
// restore completes it, with and without a restart in between.
func TestInterruptedRestore(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		fail func(t *testing.T, store Memory, path string)
		// oldKeysLive is whether the old keys are still accepted after the failure.
		oldKeysLive bool
	}{
		"the store fails": {func(_ *testing.T, store Memory, _ string) { store.FailWith(errDisk) }, true},
		"the keyring cannot be written": {func(t *testing.T, _ Memory, path string) {
			if err := os.MkdirAll(filepath.Join(path+".new", "in the way"), 0o700); err != nil {
				t.Fatal(err)
			}
		}, true},
		"the records cannot be stored": {func(_ *testing.T, store Memory, _ string) {
			store.FailIf(func(c Change) error {
				if len(c.Put) > 0 {
					return errDisk
				}
				return nil
			})
		}, false},
	} {
		for _, restart := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				_, old, _ := newIssuer(t)
				restoredToken, _ := issue(t, old, IssueRequest{})
				revokedToken, gone := issue(t, old, IssueRequest{})
				revoke(t, old, gone.ID)
				b := snapshot(t, old)

				store, path := NewMemory(), keyringPath(t)
				i, v := openIssuer(t, store, path)
				oldToken, _ := issue(t, i, IssueRequest{})
				accepted(t, v, oldToken)
				tt.fail(t, store, path)
				if _, _, err := i.Restore(context.Background(), b.keyring, b.records, 7); err == nil {
					t.Fatal("Restore returned no error")
				}
				refused(t, v, restoredToken)
				refused(t, v, revokedToken)
				if tt.oldKeysLive {
					accepted(t, v, oldToken)
				} else {
					refused(t, v, oldToken)
				}
				store.FailWith(nil)
				if err := os.RemoveAll(path + ".new"); err != nil {
					t.Fatal(err)
				}
				if restart {
					i, v = openIssuer(t, store, path)
					refused(t, v, restoredToken)
					refused(t, v, revokedToken)
				}
				if live, _ := restore(t, i, b); live != 1 {
					t.Errorf("second restore: %d live", live)
				}
				i, v = openIssuer(t, store, path)
				accepted(t, v, restoredToken)
				refused(t, v, revokedToken)
				refused(t, v, oldToken)
				if c := i.Counts(); c != (Counts{Live: 1, Revoked: 2}) {
					t.Errorf("counts are %+v", c)
				}
			})
		}
	}
}
