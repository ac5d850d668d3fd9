package backup_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/daemon/internal/data/backup"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// If a crash interrupts a restore and the signing key is reset before it is completed, the next start abandons the
// restore, so that the keys of the backup do not become valid again.
func TestResetPreventsCompletion(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	old := s.issue(t, "old")
	archive := s.write(t)
	pending := filepath.Join(s.dir, "restore.json")
	if _, err := s.issuer.Reset(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	interrupted := &interruptedKeys{Issuer: s.issuer, pending: pending}
	service := backup.New(backup.Options{Dir: s.dir, Keys: interrupted, Store: s.store, ReadKeys: store.ReadKeys, Log: quiet})
	if _, err := service.Restore(t.Context(), bytes.NewReader(archive), 0); err == nil {
		t.Fatal("the interrupted restore succeeded")
	}
	if err := os.WriteFile(pending, interrupted.content, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.issuer.Reset(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if s = s.reopen(t); s.accepts(old) {
		t.Error("a key from before the reset is accepted")
	}
	if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
		t.Errorf("files in the state directory: %s", diff)
	}

	// Without a reset after the crash, the next start completes the restore.
	if _, err := s.Restore(t.Context(), bytes.NewReader(archive), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := s.issuer.Reset(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	interrupted.Issuer = s.issuer
	service = backup.New(backup.Options{Dir: s.dir, Keys: interrupted, Store: s.store, ReadKeys: store.ReadKeys, Log: quiet})
	if _, err := service.Restore(t.Context(), bytes.NewReader(archive), 0); err == nil {
		t.Fatal("the interrupted restore succeeded")
	}
	if err := os.WriteFile(pending, interrupted.content, 0o600); err != nil {
		t.Fatal(err)
	}
	if s = s.reopen(t); !s.accepts(old) {
		t.Error("the restore was not completed")
	}
	if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
		t.Errorf("files in the state directory: %s", diff)
	}
}

// interruptedKeys fails Restore and saves the content of the pending restore's file, which a crash during Restore would leave.
type interruptedKeys struct {
	*keys.Issuer
	pending string
	content []byte
}

func (k *interruptedKeys) Restore(context.Context, keys.Secret, []keys.Record, uint32) (int, int, error) {
	var err error
	k.content, err = os.ReadFile(k.pending)
	return 0, 0, errors.Join(err, errors.New("interrupted"))
}

// stuckKeys makes it impossible to remove the file of a restore, by replacing it with a directory that is not empty.
type stuckKeys struct {
	*keys.Issuer
	pending string
	content []byte
}

func (k *stuckKeys) Restore(ctx context.Context, keyring keys.Secret, records []keys.Record, by uint32) (int, int, error) {
	live, invalidated, err := k.Issuer.Restore(ctx, keyring, records, by)
	var read error
	k.content, read = os.ReadFile(k.pending)
	return live, invalidated, errors.Join(err, read, os.Remove(k.pending), os.MkdirAll(filepath.Join(k.pending, "in the way"), 0o700))
}

// failingKeys is like stuckKeys, but its Restore fails.
type failingKeys struct{ stuckKeys }

func (k *failingKeys) Restore(ctx context.Context, keyring keys.Secret, records []keys.Record, by uint32) (live, invalidated int, err error) {
	if _, _, err := k.stuckKeys.Restore(ctx, keyring, records, by); err != nil {
		return 0, 0, err
	}
	return 0, 0, errors.New("no space left on device")
}

// If a restore fails and the next start will try it again, the error says so.
func TestFailedRestoreThatStaysPending(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	archive := s.write(t)
	failing := &failingKeys{stuckKeys{Issuer: s.issuer, pending: filepath.Join(s.dir, "restore.json")}}
	service := backup.New(backup.Options{Dir: s.dir, Keys: failing, Store: s.store, ReadKeys: store.ReadKeys, Log: quiet})
	_, err := service.Restore(t.Context(), bytes.NewReader(archive), 0)
	if err == nil || !strings.Contains(err.Error(), "no space left") || !strings.Contains(err.Error(), "next start of msbd will try the restore again, because "+failing.pending) {
		t.Errorf("Restore: %v, want the cause and that the next start will try again", err)
	}
}

// Prune is refused until the file of the last restore is removed, so that the next start brings back no pruned key.
func TestPruneWaitsForPendingRestore(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	key := s.issue(t, "a")
	archive := s.write(t)
	stuck := &stuckKeys{Issuer: s.issuer, pending: filepath.Join(s.dir, "restore.json")}
	service := backup.New(backup.Options{Dir: s.dir, Keys: stuck, Store: s.store, ReadKeys: store.ReadKeys, Log: quiet})
	if got, err := service.Restore(t.Context(), bytes.NewReader(archive), 0); err != nil || got.Live != 1 {
		t.Fatalf("Restore: %+v, %v, want 1 live", got, err)
	}
	if _, err := s.issuer.Revoke(t.Context(), "a", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := service.Prune(t.Context(), "", false, 0); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), stuck.pending) {
		t.Errorf("Prune: %v, want unavailable naming the file", err)
	}
	if dead, err := service.Prune(t.Context(), "", true, 0); err != nil || len(dead) != 1 {
		t.Errorf("Prune as a dry run: %d keys, %v, want 1", len(dead), err)
	}
	// Once the file can be removed, Prune removes it first.
	if err := errors.Join(os.RemoveAll(stuck.pending), os.WriteFile(stuck.pending, stuck.content, 0o600)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := service.Prune(t.Context(), "", false, 0); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
		t.Errorf("files in the state directory: %s", diff)
	}
	if s = s.reopen(t); s.accepts(key) || s.issuer.Counts() != (keys.Counts{}) {
		t.Errorf("the pruned key is accepted: %t; counts are %+v, want none", s.accepts(key), s.issuer.Counts())
	}
}

func TestDamagedPendingRestoreIsRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	pending := filepath.Join(s.dir, "restore.json")
	if err := os.WriteFile(pending, []byte("0123\n{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := backup.Complete(t.Context(), s.dir, func() (backup.Keys, error) { return s.issuer, nil }, quiet)
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), pending) {
		t.Errorf("Complete: %v, want data loss naming the file", err)
	}
}

func TestLeftoversAreRemoved(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for _, name := range []string{"backup-123.tmp", "restore.json.new"} {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte("secret"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = s.reopen(t)
	if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
		t.Error(diff)
	}
}
