package keys

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

var errDisk = errors.New("disk full")

func reset(t testing.TB, i *Issuer) (invalidated int) {
	t.Helper()
	n, err := i.Reset(context.Background(), 7)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestReset(t *testing.T) {
	store, path := NewMemory(), keyringPath(t)
	i, v := openIssuer(t, store, path)
	seen, _ := issue(t, i, IssueRequest{})
	unseen, _ := issue(t, i, IssueRequest{Namespaces: []string{"a"}})
	accepted(t, v, seen)
	before := i.SigningKey()
	store.TakeEvents()
	if n := reset(t, i); n != 2 {
		t.Errorf("%d keys were invalidated", n)
	}
	after := i.SigningKey()
	if after.ID == before.ID || after.InstanceID != before.InstanceID {
		t.Errorf("the signing key was %+v and is %+v, want another id and the same instance", before, after)
	}
	want := []audit.Event{
		{Action: audit.SigningReset, Actor: "uid:7", Target: after.ID},
		{Action: audit.KeysInvalid, Actor: "uid:7", Target: after.ID, Detail: map[string]string{"count": "2"}},
	}
	if diff := cmp.Diff(want, store.TakeEvents()); diff != "" {
		t.Error(diff)
	}
	fresh, _ := issue(t, i, IssueRequest{})
	check := func(i *Issuer, v *Verifier) {
		t.Helper()
		refused(t, v, seen)
		refused(t, v, unseen)
		accepted(t, v, fresh)
		if c := i.Counts(); c != (Counts{Live: 1, Revoked: 2}) {
			t.Errorf("counts are %+v", c)
		}
	}
	check(i, v)
	check(openIssuer(t, store, path))
}

// A reset also refuses a key in its grace period. The record of the key still says that it was rotated.
func TestResetEndsAGracePeriod(t *testing.T) {
	_, i, v := newIssuer(t)
	old, r := issue(t, i, IssueRequest{})
	if _, _, _, err := i.Rotate(context.Background(), RotateRequest{Ref: r.ID, Grace: "1h"}); err != nil {
		t.Fatal(err)
	}
	accepted(t, v, old)
	if n := reset(t, i); n != 2 {
		t.Errorf("%d keys were invalidated", n)
	}
	refused(t, v, old)
	if k, err := i.Find(r.ID); err != nil || k.Revocation != ByRotation || k.RevokedAt.After(time.Now()) {
		t.Errorf("the key is %+v, %v", k, err)
	}
}

// If a reset fails after the signing key was replaced, the earlier keys stay refused, and the next start completes it.
func TestResetCutShort(t *testing.T) {
	store, path := NewMemory(), keyringPath(t)
	i, v := openIssuer(t, store, path)
	key, r := issue(t, i, IssueRequest{})
	store.FailIf(func(c Change) error {
		if len(c.Put) > 0 {
			return errDisk
		}
		return nil
	})
	if _, err := i.Reset(context.Background(), 7); !errors.Is(err, errDisk) {
		t.Errorf("Reset: %v", err)
	}
	refused(t, v, key)
	if store.Records()[r.ID].Revocation != "" {
		t.Fatal("the record was marked as revoked although the store failed")
	}
	if _, _, err := Open(options(store, path)); !errors.Is(err, errDisk) {
		t.Errorf("Open with a failing store: %v", err)
	}
	store.FailWith(nil)
	store.TakeEvents()
	i, v = openIssuer(t, store, path)
	refused(t, v, key)
	if store.Records()[r.ID].Revocation != ByReset {
		t.Error("the next start did not complete the reset")
	}
	if got, want := actions(store), []string{audit.KeysInvalid + " " + i.SigningKey().ID}; !cmp.Equal(got, want) {
		t.Errorf("the next start logged %q, want %q", got, want)
	}
}

// The server can start from the files that a crash at any step of a reset leaves. Then either all of the old keys are
// accepted or none.
func TestResetCrashImages(t *testing.T) {
	t.Parallel()
	store, path := NewMemory(), keyringPath(t)
	i, _ := openIssuer(t, store, path)
	key, r := issue(t, i, IssueRequest{})
	file := func() string {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	type image struct {
		records map[string]Record
		keyring string
	}
	var images []image
	store.FailIf(func(Change) error { // is called before each change
		images = append(images, image{store.Records(), file()})
		return nil
	})
	old := file()
	reset(t, i)
	images = append(images, image{store.Records(), file()})
	if len(images) != 3 || images[0].keyring != old || images[1].keyring == old {
		t.Fatalf("the reset took %d steps", len(images))
	}
	written := file()
	for n, im := range images {
		// part is how much of the new keyring was written to the temporary file. -1 means that the file does not exist.
		for _, part := range []int{-1, 0, 1, len(written) / 2, len(written)} {
			store, path := NewMemory(), keyringPath(t)
			store.SetRecords(im.records)
			err := os.MkdirAll(filepath.Dir(path), 0o700)
			err = errors.Join(err, os.WriteFile(path, []byte(im.keyring), 0o600))
			if part >= 0 {
				err = errors.Join(err, os.WriteFile(path+".new", []byte(written[:part]), 0o600))
			}
			if err != nil {
				t.Fatal(err)
			}
			i, v := openIssuer(t, store, path)
			if im.keyring == old {
				accepted(t, v, key)
			} else {
				refused(t, v, key)
				if store.Records()[r.ID].Revocation != ByReset {
					t.Errorf("image %d: the record is not marked as revoked", n)
				}
			}
			fresh, _ := issue(t, i, IssueRequest{})
			accepted(t, v, fresh)
			reset(t, i) // succeeds although the temporary file may exist
			refused(t, v, fresh)
		}
	}
}

// If the reset cannot be written to the audit log, nothing is changed.
func TestResetThatCannotBeLogged(t *testing.T) {
	store, path := NewMemory(), keyringPath(t)
	i, v := openIssuer(t, store, path)
	key, _ := issue(t, i, IssueRequest{})
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	store.FailWith(errDisk)
	if _, err := i.Reset(context.Background(), 7); !errors.Is(err, errDisk) {
		t.Errorf("Reset: %v", err)
	}
	opts := options(store, path)
	opts.Reset = true
	if _, _, err := Open(opts); !errors.Is(err, errDisk) {
		t.Errorf("Open with Reset: %v", err)
	}
	accepted(t, v, key)
	if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
		t.Errorf("the keyring was changed (%v)", err)
	}
}

// If the new keyring is in place but could not be synced to disk, it is used nevertheless, so that the keys created
// from now on are those that the next start accepts.
func TestResetOnAFailingDisk(t *testing.T) {
	store, path := NewMemory(), keyringPath(t)
	i, v := openIssuer(t, store, path)
	old, _ := issue(t, i, IssueRequest{})
	realWriteFile := writeFile
	writeFile = func(path string, data []byte, perm fs.FileMode) error {
		return errors.Join(realWriteFile(path, data, perm), durable.ErrNotDurable, syscall.EIO)
	}
	_, err := i.Reset(context.Background(), 7)
	writeFile = realWriteFile
	if !errors.Is(err, syscall.EIO) {
		t.Errorf("Reset: %v", err)
	}
	refused(t, v, old)
	fresh, _ := issue(t, i, IssueRequest{})
	_, v = openIssuer(t, store, path)
	refused(t, v, old)
	accepted(t, v, fresh)
}

// If the new keyring cannot be written, nothing is changed, and the audit log has an entry that the reset failed.
func TestResetThatCannotWriteKeyring(t *testing.T) {
	store, path := NewMemory(), keyringPath(t)
	i, v := openIssuer(t, store, path)
	key, _ := issue(t, i, IssueRequest{})
	if err := os.MkdirAll(filepath.Join(path+".new", "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	store.TakeEvents()
	if _, err := i.Reset(context.Background(), 7); err == nil {
		t.Error("Reset returned no error")
	}
	accepted(t, v, key)
	if events := store.TakeEvents(); len(events) != 2 || events[1].Action != audit.SigningReset || events[1].Detail["failed"] == "" {
		t.Errorf("the logged events are %+v", events)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := i.Reset(ctx, 7); !errors.Is(err, context.Canceled) {
		t.Errorf("Reset with a canceled context: %v", err)
	}
}

func TestOpenWithReset(t *testing.T) {
	store, path := NewMemory(), keyringPath(t)
	i, _ := openIssuer(t, store, path)
	key, r := issue(t, i, IssueRequest{})
	store.TakeEvents()
	opts := options(store, path)
	opts.Reset = true
	again, v := openWith(t, opts)
	refused(t, v, key)
	before, after := i.SigningKey(), again.SigningKey()
	if after.ID == before.ID || after.InstanceID != before.InstanceID || time.Since(after.CreatedAt) > time.Hour {
		t.Errorf("the signing key was %+v and is %+v", before, after)
	}
	if store.Records()[r.ID].Revocation != ByReset {
		t.Error("the record is not marked as revoked")
	}
	want := []audit.Event{
		{Action: audit.SigningReset, Actor: audit.ActorServer, Target: after.ID},
		{Action: audit.KeysInvalid, Actor: audit.ActorServer, Target: after.ID, Detail: map[string]string{"count": "1"}},
	}
	if diff := cmp.Diff(want, store.TakeEvents()); diff != "" {
		t.Error(diff)
	}
}
