package backup_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/data/backup"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

var quiet = slog.New(slog.DiscardHandler)

// site is a server's state, opened.
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

// files are the names in the state directory, but for the lock.
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
	made := s.issue(t, "made-later")

	got, err := s.Restore(t.Context(), bytes.NewReader(archive), 7)
	if err != nil {
		t.Fatal(err)
	}
	if got.Live != 1 || got.Invalidated != 1 || got.TakenAt.IsZero() {
		t.Errorf("Restore: %+v, want 1 live, 1 invalidated", got)
	}
	for range 2 {
		is := []bool{s.accepts(live), s.accepts(revoked), s.accepts(revokedLater), s.accepts(made)}
		if diff := cmp.Diff([]bool{true, false, false, false}, is); diff != "" {
			t.Error(diff)
		}
		if now := s.issuer.SigningKey(); now != before {
			t.Errorf("the signing key is %v, want %v", now, before)
		}
		if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
			t.Errorf("something was left behind: %s", diff)
		}
		if _, err := s.store.VerifyAudit(t.Context()); err != nil {
			t.Error(err)
		}
		s = s.reopen(t)
	}
	actions := s.actions(t)
	for _, want := range []string{audit.ServerBackup, audit.ServerRestore} {
		if !slices.Contains(actions, want) {
			t.Errorf("the audit log has %v, not %s", actions, want)
		}
	}
}

func TestRestoreOnAnotherServer(t *testing.T) {
	t.Parallel()
	from, to := newSite(t), newSite(t)
	moved, foreign := from.issue(t, "moved"), to.issue(t, "foreign")
	got, err := to.Restore(t.Context(), bytes.NewReader(from.write(t)), 0)
	if err != nil || got.Live != 1 || got.Invalidated != 1 {
		t.Fatalf("Restore: %+v, %v", got, err)
	}
	to = to.reopen(t)
	if !to.accepts(moved) || to.accepts(foreign) {
		t.Errorf("accepts the backup's key: %v, its own: %v", to.accepts(moved), to.accepts(foreign))
	}
	if got, want := to.issuer.SigningKey(), from.issuer.SigningKey(); got != want {
		t.Errorf("the signing key is %v, want %v", got, want)
	}
}

// The archive can be read with tar, and its audit log be verified by anyone.
func TestArchive(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	key := s.issue(t, "a")
	head := s.store.AuditHead()
	archive := s.write(t)
	members := map[string][]byte{}
	var names []string
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Mode != 0o600 {
			t.Errorf("%s has mode %o", h.Name, h.Mode)
		}
		names = append(names, h.Name)
		if members[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"manifest.json", "keyring.json", "msb.db", "audit.jsonl"}, names); diff != "" {
		t.Error(diff)
	}
	if got, err := audit.Verify(bytes.NewReader(members["audit.jsonl"])); err != nil || got != head {
		t.Errorf("the audit log ends with %v, %v, want %v", got, err, head)
	}
	keyring, err := os.ReadFile(filepath.Join(s.dir, "keyring.json"))
	if err != nil || !bytes.Equal(keyring, members["keyring.json"]) {
		t.Errorf("keyring.json is not the file: %v", err)
	}
	if signing := s.issuer.SigningKey(); !bytes.Contains(members["manifest.json"], []byte(signing.ID)) {
		t.Errorf("the manifest does not name the signing key:\n%s", members["manifest.json"])
	}
	if bytes.Contains(archive, []byte(key)) {
		t.Error("the archive holds an API key")
	}
	if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
		t.Errorf("something was left behind: %s", diff)
	}
}

// Keys can be made while somebody reads the archive slowly.
func TestSlowReaderHoldsNothingUp(t *testing.T) {
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
		t.Error("a key of the same signing key is refused after the restore")
	}
}

// copiedStore calls copying when a snapshot is about to be copied.
type copiedStore struct {
	*store.Store
	copying func()
}

func (s copiedStore) OpenSnapshot() (interface {
	io.WriterTo
	io.Closer
}, error) {
	snapshot, err := s.Store.OpenSnapshot()
	return copied{snapshot, snapshot, s.copying}, err
}

type copied struct {
	io.WriterTo
	io.Closer
	copying func()
}

func (c copied) WriteTo(w io.Writer) (int64, error) {
	c.copying()
	return c.WriterTo.WriteTo(w)
}

// However long the store takes to be copied, a revocation does not wait for that.
func TestRevocationBesideACopy(t *testing.T) {
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
	beside := copiedStore{s.store, func() {
		copies++
		done := make(chan error, 1)
		// It is revoked already: that takes the lock, and writes nothing. So small a store would have to grow.
		go func() { done <- revoke() }()
		select {
		case err := <-done:
			waited = errors.Join(waited, err)
		case <-time.After(30 * time.Second):
			waited = errors.New("it waits")
		}
	}}
	service := backup.New(backup.Options{Dir: s.dir, Keys: s.issuer, Store: beside, ReadKeys: store.ReadKeys, Log: quiet})
	if err := service.Write(t.Context(), io.Discard, 0); err != nil || waited != nil || copies != 1 {
		t.Errorf("%d copies, %v; the revocation: %v", copies, err, waited)
	}
}

// rewrite makes an archive anew with what change does to its members; their checksums become right.
func rewrite(t testing.TB, archive []byte, change func(h *tar.Header, content []byte) (*tar.Header, []byte)) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h, content = change(h, content); h == nil {
			continue
		}
		h.Size = int64(len(content))
		if h.Typeflag != tar.TypeReg {
			h.Size = 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write(content); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// A bad archive is refused, says why, and changes nothing.
func TestBadArchives(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.issue(t, "in-the-backup")
	good := s.write(t)
	if _, err := s.issuer.Reset(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	key := s.issue(t, "present")

	member := func(name string, change func(h *tar.Header, content []byte) (*tar.Header, []byte)) []byte {
		return rewrite(t, good, func(h *tar.Header, content []byte) (*tar.Header, []byte) {
			if h.Name == name {
				return change(h, content)
			}
			return h, content
		})
	}
	replaced := func(name, old, new string) []byte {
		return member(name, func(h *tar.Header, content []byte) (*tar.Header, []byte) {
			if !bytes.Contains(content, []byte(old)) {
				t.Fatalf("%s holds no %q", name, old)
			}
			return h, bytes.Replace(content, []byte(old), []byte(new), 1)
		})
	}
	renamed := func(name, to string) []byte {
		return member(name, func(h *tar.Header, content []byte) (*tar.Header, []byte) { h.Name = to; return h, content })
	}
	typed := func(name string, typ byte) []byte {
		return member(name, func(h *tar.Header, content []byte) (*tar.Header, []byte) {
			h.Typeflag, h.Linkname = typ, "/etc/passwd"
			return h, content
		})
	}
	without := func(name string) []byte {
		return member(name, func(*tar.Header, []byte) (*tar.Header, []byte) { return nil, nil })
	}
	flipped := func(at int) []byte {
		b := bytes.Clone(good)
		b[at] ^= 1
		return b
	}
	tests := map[string]struct {
		archive []byte
		class   func(error) bool
		says    string
	}{
		"empty":                {nil, errdefs.IsInvalidArgument, "no backup"},
		"text":                 {[]byte("hello\n"), errdefs.IsInvalidArgument, "no backup"},
		"other tar":            {renamed("manifest.json", "README"), errdefs.IsInvalidArgument, "no backup"},
		"other format":         {replaced("manifest.json", "msb-backup", "xyz-backup"), errdefs.IsInvalidArgument, "no backup"},
		"newer":                {replaced("manifest.json", `"version": 1`, `"version": 2, "new": [{}]`), errdefs.IsFailedPrecondition, "newer msbd"},
		"version 0":            {replaced("manifest.json", `"version": 1`, `"version": 0`), errdefs.IsDataLoss, "manifest"},
		"unknown in manifest":  {replaced("manifest.json", `"version": 1`, `"version": 1, "new": 1`), errdefs.IsDataLoss, "manifest"},
		"manifest not JSON":    {replaced("manifest.json", `{`, `[`), errdefs.IsDataLoss, "manifest"},
		"huge size":            {replaced("manifest.json", `"size": `, `"size": 99999999999999`), errdefs.IsDataLoss, "manifest"},
		"negative size":        {replaced("manifest.json", `"size": `, `"size": -`), errdefs.IsDataLoss, "manifest"},
		"path upwards":         {renamed("keyring.json", "../keyring.json"), errdefs.IsDataLoss, "keyring.json"},
		"absolute path":        {renamed("msb.db", "/msb.db"), errdefs.IsDataLoss, "msb.db"},
		"named in manifest":    {replaced("manifest.json", `"msb.db"`, `"../x"`), errdefs.IsDataLoss, "manifest"},
		"symbolic link":        {typed("msb.db", tar.TypeSymlink), errdefs.IsDataLoss, "msb.db"},
		"hard link":            {typed("keyring.json", tar.TypeLink), errdefs.IsDataLoss, "keyring.json"},
		"device":               {typed("audit.jsonl", tar.TypeChar), errdefs.IsDataLoss, "audit.jsonl"},
		"without keyring":      {without("keyring.json"), errdefs.IsDataLoss, "keyring.json"},
		"without store":        {without("msb.db"), errdefs.IsDataLoss, "msb.db"},
		"without audit log":    {without("audit.jsonl"), errdefs.IsDataLoss, "audit.jsonl"},
		"keyring changed":      {replaced("keyring.json", `"seed":"`, `"seed":"A`), errdefs.IsDataLoss, "keyring.json"},
		"store flipped":        {flipped(8 << 10), errdefs.IsDataLoss, "msb.db is not what was saved"},
		"audit log changed":    {replaced("audit.jsonl", "uid:1000", "uid:1001"), errdefs.IsDataLoss, "audit.jsonl"},
		"cut off":              {good[:len(good)/2], errdefs.IsDataLoss, "ends within"},
		"cut off in manifest":  {good[:600], errdefs.IsDataLoss, "manifest"},
		"something behind":     {append(bytes.Clone(good), "more"...), errdefs.IsDataLoss, "follows"},
		"much behind":          {append(bytes.Clone(good), make([]byte, 100<<10)...), errdefs.IsDataLoss, "follows"},
		"two in one":           {append(bytes.Clone(good[:len(good)-1024]), good...), errdefs.IsDataLoss, "follows"},
		"hashed anew, keyring": {forged(t, good, "keyring.json", `"key_id":"`, `"key_id":"0`), errdefs.IsDataLoss, "keyring"},
		"hashed anew, store":   {forged(t, good, "msb.db", "created_at", "cReated_at"), errdefs.IsDataLoss, "store"},
	}
	before := s.actions(t)
	for name, tt := range tests {
		_, err := s.Restore(t.Context(), bytes.NewReader(tt.archive), 0)
		if !tt.class(err) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, want %q", name, err, tt.says)
		}
		if !s.accepts(key) {
			t.Fatalf("%s: the present key is refused", name)
		}
	}
	fault := errors.New("line is dead")
	_, err := s.Restore(t.Context(), io.MultiReader(bytes.NewReader(good[:9000]), iotest.ErrReader(fault)), 0)
	if !errors.Is(err, fault) || errdefs.IsDataLoss(err) {
		t.Errorf("an error of the reader: %v", err)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Restore(canceled, bytes.NewReader(good), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	if diff := cmp.Diff(before, s.actions(t)); diff != "" {
		t.Errorf("the audit log was changed: %s", diff)
	}
	if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
		t.Errorf("something was left behind: %s", diff)
	}
	if s = s.reopen(t); !s.accepts(key) {
		t.Error("the present key is refused after a restart")
	}
}

// A restore that a crash cut short after a reset does not bring the keys back.
func TestResetOutlivesAStage(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	old := s.issue(t, "old")
	archive := s.write(t)
	stage := filepath.Join(s.dir, "restore.json")
	if _, err := s.issuer.Reset(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	interrupted := &interruptedKeys{Issuer: s.issuer, stage: stage}
	service := backup.New(backup.Options{Dir: s.dir, Keys: interrupted, Store: s.store, ReadKeys: store.ReadKeys, Log: quiet})
	if _, err := service.Restore(t.Context(), bytes.NewReader(archive), 0); err == nil {
		t.Fatal("the interrupted restore succeeded")
	}
	if err := os.WriteFile(stage, interrupted.content, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.issuer.Reset(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if s = s.reopen(t); s.accepts(old) {
		t.Error("a key from before the reset is accepted")
	}
	if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
		t.Errorf("something was left behind: %s", diff)
	}

	// Without that reset, the start completes it.
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
	if err := os.WriteFile(stage, interrupted.content, 0o600); err != nil {
		t.Fatal(err)
	}
	if s = s.reopen(t); !s.accepts(old) {
		t.Error("the restore was not completed")
	}
	if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
		t.Errorf("something was left behind: %s", diff)
	}
}

// interruptedKeys keeps what a crash during Restore would leave.
type interruptedKeys struct {
	*keys.Issuer
	stage   string
	content []byte
}

func (k *interruptedKeys) Restore(context.Context, keys.Secret, []keys.Record, uint32) (int, int, error) {
	var err error
	k.content, err = os.ReadFile(k.stage)
	return 0, 0, errors.Join(err, errors.New("interrupted"))
}

// stuckKeys sees to it that the stage of a restore cannot be removed.
type stuckKeys struct {
	*keys.Issuer
	stage   string
	content []byte
}

func (k *stuckKeys) Restore(ctx context.Context, keyring keys.Secret, records []keys.Record, by uint32) (int, int, error) {
	live, invalidated, err := k.Issuer.Restore(ctx, keyring, records, by)
	var read error
	k.content, read = os.ReadFile(k.stage)
	return live, invalidated, errors.Join(err, read, os.Remove(k.stage), os.MkdirAll(filepath.Join(k.stage, "in the way"), 0o700))
}

// A stage that could not be removed brings back no key that was pruned since.
func TestPruneWaitsForAStage(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	key := s.issue(t, "a")
	archive := s.write(t)
	stuck := &stuckKeys{Issuer: s.issuer, stage: filepath.Join(s.dir, "restore.json")}
	service := backup.New(backup.Options{Dir: s.dir, Keys: stuck, Store: s.store, ReadKeys: store.ReadKeys, Log: quiet})
	if got, err := service.Restore(t.Context(), bytes.NewReader(archive), 0); err != nil || got.Live != 1 {
		t.Fatalf("Restore: %+v, %v", got, err)
	}
	if _, err := s.issuer.Revoke(t.Context(), "a", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := service.Prune(t.Context(), "", false, 0); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), stuck.stage) {
		t.Errorf("Prune: %v, want unavailable naming the file", err)
	}
	if dead, err := service.Prune(t.Context(), "", true, 0); err != nil || len(dead) != 1 {
		t.Errorf("a dry run: %d keys, %v", len(dead), err)
	}
	// Once it can be removed, that is done first.
	if err := errors.Join(os.RemoveAll(stuck.stage), os.WriteFile(stuck.stage, stuck.content, 0o600)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := service.Prune(t.Context(), "", false, 0); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
		t.Errorf("something was left behind: %s", diff)
	}
	if s = s.reopen(t); s.accepts(key) || s.issuer.Counts() != (keys.Counts{}) {
		t.Errorf("the pruned key is accepted: %t; counts are %+v", s.accepts(key), s.issuer.Counts())
	}
}

func TestDamagedStageIsRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	stage := filepath.Join(s.dir, "restore.json")
	if err := os.WriteFile(stage, []byte("0123\n{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := backup.Complete(t.Context(), s.dir, func() (backup.Keys, error) { return s.issuer, nil }, quiet)
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), stage) {
		t.Errorf("Complete: %v, want data loss naming the file", err)
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
	if _, err := w.Write([]byte("x")); err != nil { // the first is reading
		t.Fatal(err)
	}
	if _, err := s.Restore(t.Context(), strings.NewReader(""), 0); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a second restore: %v, want failed precondition", err)
	}
	if _, err := s.Prune(t.Context(), "", false, 0); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a prune beside it: %v, want failed precondition", err)
	}
	w.Close()
	if err := <-done; !errdefs.IsInvalidArgument(err) {
		t.Errorf("the first: %v", err)
	}
}

func TestLeftoversAreRemoved(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	if err := os.WriteFile(filepath.Join(s.dir, "backup-123.tmp"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = s.reopen(t)
	if diff := cmp.Diff(usualFiles, s.files(t)); diff != "" {
		t.Error(diff)
	}
}

// forged replaces something in a member and makes the manifest fit.
func forged(t testing.TB, archive []byte, name, old, new string) []byte {
	t.Helper()
	var was, is string
	var size int
	changed := rewrite(t, archive, func(h *tar.Header, content []byte) (*tar.Header, []byte) {
		if h.Name == name {
			was = fmt.Sprintf("%x", sha256.Sum256(content))
			content = bytes.Replace(content, []byte(old), []byte(new), 1)
			is, size = fmt.Sprintf("%x", sha256.Sum256(content)), len(content)
		}
		return h, content
	})
	return rewrite(t, changed, func(h *tar.Header, content []byte) (*tar.Header, []byte) {
		if h.Name == "manifest.json" {
			content = bytes.Replace(content, []byte(was), []byte(is), 1)
			sizes := regexp.MustCompile(`("name": "` + name + `",\s*"size": )\d+`)
			content = sizes.ReplaceAll(content, fmt.Appendf(nil, "${1}%d", size))
		}
		return h, content
	})
}
