package backup_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/data/backup"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

func TestMain(m *testing.M) {
	store.RunCheckIfChild()
	os.Exit(m.Run())
}

var quiet = slog.New(slog.DiscardHandler)

// site is an open state directory with everything that a backup needs.
type site struct {
	*backup.Service
	dir      string
	store    *store.Store
	issuer   *keys.Issuer
	verifier *keys.Verifier
}

func openKeys(dir string, s *store.Store) (*keys.Issuer, *keys.Verifier, error) {
	return keys.Open(keys.Options{KeyringPath: filepath.Join(dir, "keyring.json"), Store: s, Log: quiet})
}

func openSite(t testing.TB, dir string) *site {
	t.Helper()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	err = backup.Complete(t.Context(), dir, func() (backup.Keys, error) {
		issuer, _, err := openKeys(dir, s)
		return issuer, err
	}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	issuer, verifier, err := openKeys(dir, s)
	if err != nil {
		t.Fatal(err)
	}
	service := backup.New(backup.Options{Dir: dir, Keys: issuer, Store: s, ReadKeys: store.ReadKeys, Log: quiet})
	return &site{service, dir, s, issuer, verifier}
}

func newSite(t testing.TB) *site { return openSite(t, filepath.Join(t.TempDir(), "state")) }

func (s *site) reopen(t testing.TB) *site {
	t.Helper()
	if err := s.store.Close(); err != nil {
		t.Fatal(err)
	}
	return openSite(t, s.dir)
}

func (s *site) issue(t testing.TB, name string) (key string) {
	t.Helper()
	secret, _, err := s.issuer.Issue(t.Context(), keys.IssueRequest{Name: name, CreatedBy: 1000})
	if err != nil {
		t.Fatal(err)
	}
	return secret.Reveal()
}

func (s *site) accepts(key string) bool {
	_, err := s.verifier.Verify(key, netip.Addr{})
	return err == nil
}

func (s *site) write(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := s.Write(t.Context(), &b, 1000); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// files returns the names of the files in the state directory, except for the lock.
func (s *site) files(t testing.TB) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "msbd.lock" {
			names = append(names, e.Name())
		}
	}
	return names
}

var usualFiles = []string{"audit.jsonl", "keyring.json", "msb.db"}

func (s *site) actions(t testing.TB) (actions []string) {
	t.Helper()
	err := s.store.TailAudit(t.Context(), 1000, false, func(line []byte) error {
		e, err := audit.Parse(line)
		actions = append(actions, e.Action)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return actions
}

func TestRestoreAfterReset(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	live, revoked := s.issue(t, "live"), s.issue(t, "revoked")
	revokedLater := s.issue(t, "revoked-later")
	if _, err := s.issuer.Revoke(t.Context(), "revoked", 0); err != nil {
		t.Fatal(err)
	}
	before := s.issuer.SigningKey()
	archive := s.write(t)
	if _, err := s.issuer.Revoke(t.Context(), "revoked-later", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := s.issuer.Reset(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	issuedLater := s.issue(t, "issued-later")

	got, err := s.Restore(t.Context(), bytes.NewReader(archive), 7)
	if err != nil {
		t.Fatal(err)
	}
	if got.Live != 1 || got.Invalidated != 1 || got.TakenAt.IsZero() {
		t.Errorf("Restore: %+v, want 1 live, 1 invalidated", got)
	}
	for range 2 {
		accepted := []bool{s.accepts(live), s.accepts(revoked), s.accepts(revokedLater), s.accepts(issuedLater)}
		if diff := cmp.Diff([]bool{true, false, false, false}, accepted); diff != "" {
			t.Error(diff)
		}
		if now := s.issuer.SigningKey(); now != before {
			t.Errorf("the signing key is %v, want %v", now, before)
		}
		if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
			t.Errorf("files in the state directory: %s", diff)
		}
		if _, err := s.store.VerifyAudit(t.Context()); err != nil {
			t.Error(err)
		}
		s = s.reopen(t)
	}
	actions := s.actions(t)
	for _, want := range []string{audit.ServerBackup, audit.ServerRestore} {
		if !slices.Contains(actions, want) {
			t.Errorf("the audit log has %v, want %s among them", actions, want)
		}
	}
}

func TestRestoreOnAnotherServer(t *testing.T) {
	t.Parallel()
	from, to := newSite(t), newSite(t)
	moved, foreign := from.issue(t, "moved"), to.issue(t, "foreign")
	got, err := to.Restore(t.Context(), bytes.NewReader(from.write(t)), 0)
	if err != nil || got.Live != 1 || got.Invalidated != 1 {
		t.Fatalf("Restore: %+v, %v, want 1 live, 1 invalidated", got, err)
	}
	to = to.reopen(t)
	if !to.accepts(moved) || to.accepts(foreign) {
		t.Errorf("accepts the key of the backup: %v, want true; its earlier key: %v, want false", to.accepts(moved), to.accepts(foreign))
	}
	if got, want := to.issuer.SigningKey(), from.issuer.SigningKey(); got != want {
		t.Errorf("the signing key is %v, want %v", got, want)
	}
}

// Keys can be created while a client reads the archive slowly.
func TestSlowReaderBlocksNothing(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	r, w := io.Pipe()
	go func() { w.CloseWithError(s.Write(t.Context(), w, 0)) }()
	first := make([]byte, 1)
	if _, err := io.ReadFull(r, first); err != nil {
		t.Fatal(err)
	}
	key := s.issue(t, "meanwhile")
	rest, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Restore(t.Context(), bytes.NewReader(append(first, rest...)), 0); err != nil {
		t.Fatal(err)
	}
	if !s.accepts(key) {
		t.Error("a key issued after the backup with the same signing key is refused after the restore")
	}
}

// hookedStore calls copying before a snapshot is copied.
type hookedStore struct {
	*store.Store
	copying func()
}

func (s hookedStore) OpenSnapshot() (interface {
	io.WriterTo
	io.Closer
}, error) {
	snapshot, err := s.Store.OpenSnapshot()
	return hookedSnapshot{snapshot, snapshot, s.copying}, err
}

type hookedSnapshot struct {
	io.WriterTo
	io.Closer
	copying func()
}

func (c hookedSnapshot) WriteTo(w io.Writer) (int64, error) {
	c.copying()
	return c.WriterTo.WriteTo(w)
}

// A revocation does not wait until the store is copied.
func TestRevocationDuringACopy(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.issue(t, "a")
	revoke := func() error {
		_, err := s.issuer.Revoke(t.Context(), "a", 0)
		return err
	}
	if err := revoke(); err != nil {
		t.Fatal(err)
	}
	copies, waited := 0, error(nil)
	hooked := hookedStore{s.store, func() {
		copies++
		done := make(chan error, 1)
		// The key is already revoked, so this call takes the lock of the keys but writes nothing. A write would wait
		// for the snapshot, because a store this small would have to grow.
		go func() { done <- revoke() }()
		select {
		case err := <-done:
			waited = errors.Join(waited, err)
		case <-time.After(30 * time.Second):
			waited = errors.New("not done after 30s")
		}
	}}
	service := backup.New(backup.Options{Dir: s.dir, Keys: s.issuer, Store: hooked, ReadKeys: store.ReadKeys, Log: quiet})
	if err := service.Write(t.Context(), io.Discard, 0); err != nil || waited != nil || copies != 1 {
		t.Errorf("Write: %v, with %d copies, want 1; the revocation: %v", err, copies, waited)
	}
}

func TestOneRestoreAtATime(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	r, w := io.Pipe()
	done := make(chan error)
	go func() {
		_, err := s.Restore(t.Context(), r, 0)
		done <- err
	}()
	if _, err := w.Write([]byte("x")); err != nil { // returns once the first restore is reading
		t.Fatal(err)
	}
	if _, err := s.Restore(t.Context(), strings.NewReader(""), 0); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a second restore: %v, want failed precondition", err)
	}
	if _, err := s.Prune(t.Context(), "", false, 0); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a prune during a restore: %v, want failed precondition", err)
	}
	w.Close()
	if err := <-done; !errdefs.IsInvalidArgument(err) {
		t.Errorf("the first restore: %v, want invalid argument", err)
	}
}
