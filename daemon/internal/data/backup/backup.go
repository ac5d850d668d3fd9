// Package backup writes archives of the API keys, the signing key and the audit log, and brings the keys
// of one back into force, both while the server runs. An archive is as secret as the signing key that is
// in it. Only package daemon imports this package.
package backup

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// Keys holds the API keys and the signing key. A *keys.Issuer is one.
type Keys interface {
	SigningKey() keys.SigningKey
	// Snapshot calls take with the keyring file's content, while no key and no signing key changes: so take
	// should not take long.
	Snapshot(take func(keyring keys.Secret) error) error
	// Prune removes keys that have been dead for so long, or says which.
	Prune(ctx context.Context, deadFor string, dryRun bool, by uint32) ([]keys.Key, error)
	// Restore takes what Snapshot gave and the records that the store held then. What is damaged or of a
	// newer version changes nothing. Done again, it completes.
	Restore(ctx context.Context, keyring keys.Secret, records []keys.Record, by uint32) (live, invalidated int, err error)
}

// Store holds the records. A *store.Store is one.
type Store interface {
	// OpenSnapshot returns the store as it is at this moment, to be copied. Writers may wait for its Close.
	OpenSnapshot() (interface {
		io.WriterTo
		io.Closer
	}, error)
	// OpenAudit returns the audit log as it is at this moment.
	OpenAudit() (io.ReadCloser, error)
	Audit(e audit.Event) error
}

// Options is what a Service is made of.
type Options struct {
	// Dir is the state directory.
	Dir   string
	Keys  Keys
	Store Store
	// ReadKeys reads the keys of a Store's snapshot, in a file that it may change.
	ReadKeys func(path string) ([]keys.Record, error)
	Log      *slog.Logger
}

// Service writes and reads archives. It is safe for concurrent use.
type Service struct {
	Options
	restoring sync.Mutex
	// stagePending reports that the next start may complete a restore that has ended. restoring guards it.
	stagePending bool
}

// New makes a Service.
func New(o Options) *Service { return &Service{Options: o} }

// Write writes an archive, for the local user with the uid by. Keys change meanwhile, and nothing waits for w.
func (s *Service) Write(ctx context.Context, w io.Writer, by uint32) error {
	temp, err := createTemp(s.Dir)
	if err != nil {
		return fmt.Errorf("make backup: %w: %w", err, errdefs.ErrUnavailable)
	}
	defer temp.Close()
	if err := os.Remove(temp.Name()); err != nil { // it lives on until it is closed
		return fmt.Errorf("make backup: %w: %w", err, errdefs.ErrUnavailable)
	}
	m, keyring, err := s.collect(temp)
	if err != nil {
		return fmt.Errorf("make backup: %w: see to the space on the disk of %s: %w", err, s.Dir, errdefs.ErrUnavailable)
	}
	// Before anything is handed out: no backup is unheard of.
	err = s.Store.Audit(audit.Event{Action: audit.ServerBackup, Actor: audit.ActorUID(by), Target: m.SigningKeyID})
	if err != nil {
		return fmt.Errorf("make backup: %w", err)
	}
	db, log := m.Members[1].Size, m.Members[2].Size
	err = writeArchive(&writerWithContext{ctx, w}, m,
		strings.NewReader(keyring.Reveal()), io.NewSectionReader(temp, 0, db), io.NewSectionReader(temp, db, log))
	if err != nil {
		return fmt.Errorf("write backup: %w", err)
	}
	return nil
}

// collect puts the store and the audit log into temp, one behind the other, as they are at one moment.
func (s *Service) collect(temp io.Writer) (m manifest, keyring keys.Secret, err error) {
	m = manifest{Format: formatName, Version: formatVersion}
	var (
		log io.ReadCloser
		db  interface {
			io.WriterTo
			io.Closer
		}
	)
	// They are opened together, and copied once keys may change again: a revocation does not wait for that.
	err = s.Keys.Snapshot(func(k keys.Secret) (err error) {
		keyring = k
		signing := s.Keys.SigningKey()
		m.TakenAt, m.InstanceID, m.SigningKeyID = time.Now().UTC().Truncate(time.Second), signing.InstanceID, signing.ID
		if log, err = s.Store.OpenAudit(); err != nil {
			return err
		}
		db, err = s.Store.OpenSnapshot()
		return err
	})
	if log != nil {
		defer log.Close()
	}
	if err != nil {
		return m, keyring, err
	}
	sum := sha256.New()
	size, err := db.WriteTo(io.MultiWriter(temp, sum))
	if err = errors.Join(err, db.Close()); err != nil {
		return m, keyring, err
	}
	store := member{Name: storeName, Size: size, SHA256: digest(sum)}
	ring, err := measure(keyringName, io.Discard, strings.NewReader(keyring.Reveal()))
	if err != nil {
		return m, keyring, err
	}
	lines, err := measure(auditName, temp, log)
	m.Members = []member{ring, store, lines}
	return m, keyring, err
}

// Restore reads an archive to the end of r and brings its keys into force, for the local user with the
// uid by; see keys.Issuer for what becomes of the present ones. Sandboxes stay as they are. It changes
// nothing unless all of the archive is good: what is no archive is errdefs.ErrInvalidArgument, a newer
// one errdefs.ErrFailedPrecondition, a damaged one errdefs.ErrDataLoss. A restore that a crash cuts short
// is completed at the next start.
func (s *Service) Restore(ctx context.Context, r io.Reader, by uint32) (keys.Restored, error) {
	if !s.restoring.TryLock() {
		return keys.Restored{}, errRestoring
	}
	defer s.restoring.Unlock()
	st, err := s.read(readerWithContext{ctx, r})
	if err != nil {
		return keys.Restored{}, fmt.Errorf("restore backup: %w", err)
	}
	st.By = by
	st.ReplacedKeyID = s.Keys.SigningKey().ID
	s.stagePending = true // until the stage is known to be gone
	if err := st.save(s.Dir); err != nil {
		return keys.Restored{}, fmt.Errorf("restore backup: put its keys aside: %w: nothing was changed: %w", err, errdefs.ErrUnavailable)
	}
	// From here on it is not given up halfway.
	live, invalidated, err := s.Keys.Restore(context.WithoutCancel(ctx), st.keyring(), st.Records, by)
	// The caller knows how it went: the next start has nothing to complete. If the stage cannot be
	// removed, completing it is harmless, or refused if the signing key changed since: for Prune, which it
	// would undo, waits until it is gone.
	removed := removeStage(s.Dir)
	if s.stagePending = removed != nil; s.stagePending {
		s.Log.Error("remove what a restore put aside", "err", removed)
	}
	if err != nil {
		return keys.Restored{}, fmt.Errorf("restore backup: %w", err)
	}
	return keys.Restored{TakenAt: st.TakenAt, Live: live, Invalidated: invalidated}, nil
}

// Prune is that of Keys. Where the next start might complete a restore, which would bring back what is
// forgotten now, nothing is: errdefs.ErrFailedPrecondition or errdefs.ErrUnavailable.
func (s *Service) Prune(ctx context.Context, deadFor string, dryRun bool, by uint32) ([]keys.Key, error) {
	if dryRun {
		return s.Keys.Prune(ctx, deadFor, dryRun, by)
	}
	if !s.restoring.TryLock() {
		return nil, errRestoring
	}
	defer s.restoring.Unlock()
	if s.stagePending {
		if err := removeStage(s.Dir); err != nil {
			return nil, fmt.Errorf("what the last restore put aside cannot be removed, so that the next start would bring back "+
				"pruned keys: see to %s: %w: %w", stagePath(s.Dir), err, errdefs.ErrUnavailable)
		}
		s.stagePending = false
	}
	return s.Keys.Prune(ctx, deadFor, dryRun, by)
}

var errRestoring = fmt.Errorf("a backup is being restored: wait for that: %w", errdefs.ErrFailedPrecondition)

// read reads an archive.
func (s *Service) read(r io.Reader) (_ *stage, err error) {
	db, err := createTemp(s.Dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	defer func() { err = errors.Join(err, os.Remove(db.Name())) }()
	m, keyring, err := readArchive(r, db)
	if err := errors.Join(err, db.Close()); err != nil {
		return nil, err
	}
	records, err := s.ReadKeys(db.Name())
	if errdefs.IsDataLoss(err) {
		return nil, damaged("its store: " + err.Error())
	}
	if err != nil {
		return nil, fmt.Errorf("the backup's store: %w", err)
	}
	return &stage{TakenAt: m.TakenAt, SigningKeyID: m.SigningKeyID, Keyring: []byte(keyring.Reveal()), Records: records}, nil
}

// Complete ends a restore that a crash cut short, and removes what else was left. It comes before the keys
// are opened for use, so that a reset at the start has the last word. open opens them as they are.
func Complete(ctx context.Context, dir string, open func() (Keys, error), log *slog.Logger) error {
	if err := removeTemps(dir); err != nil {
		return fmt.Errorf("remove what a backup left: %w", err)
	}
	st, err := loadStage(dir)
	if st == nil || err != nil {
		return err
	}
	incomplete := func(err error) error {
		return fmt.Errorf("complete a restore that was cut short: %w: to give it up, remove %s; then restore the backup again",
			err, stagePath(dir))
	}
	keys, err := open()
	if err != nil {
		return incomplete(err)
	}
	// After a reset, the backup's keys must not come back.
	if id := keys.SigningKey().ID; id != st.ReplacedKeyID && id != st.SigningKeyID {
		log.Warn("a restore that was cut short is given up: the signing key was replaced since", "taken_at", st.TakenAt)
		return removeStage(dir)
	}
	live, invalidated, err := keys.Restore(ctx, st.keyring(), st.Records, st.By)
	switch {
	case errdefs.IsDataLoss(err), errdefs.IsFailedPrecondition(err):
		// Nothing was changed, nor would it be the next time.
		log.Error("a restore that was cut short is given up: restore the backup again", "taken_at", st.TakenAt, "err", err)
	case err != nil:
		return incomplete(err)
	default:
		log.Warn("completed a restore that was cut short", "taken_at", st.TakenAt, "live", live, "invalidated", invalidated)
	}
	return removeStage(dir)
}

type readerWithContext struct {
	ctx context.Context
	io.Reader
}

func (r readerWithContext) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(b)
}

type writerWithContext struct {
	ctx context.Context
	io.Writer
}

func (w writerWithContext) Write(b []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.Writer.Write(b)
}
