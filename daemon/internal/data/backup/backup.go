// Package backup writes archives of the API keys, the signing key and the audit log, and restores the keys from an
// archive, both while the server runs. An archive is as secret as the signing key in it. Only package daemon imports this
// package.
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
	"github.com/msbd/msbd/daemon/internal/sys/ctxio"
)

// Keys manages the API keys and the signing key. A *keys.Issuer implements it.
type Keys interface {
	SigningKey() keys.SigningKey
	// Snapshot calls take with the content of the keyring file. No API key and no signing key changes during the
	// call, so take should return quickly.
	Snapshot(take func(keyring keys.Secret) error) error
	// Prune removes the keys that have been dead for deadFor, and returns them. With dryRun it only returns them.
	Prune(ctx context.Context, deadFor string, dryRun bool, by uint32) ([]keys.Key, error)
	// Restore restores a keyring that Snapshot passed and the records that the store had at that time. It changes
	// nothing if they are damaged or of a newer version. If it was interrupted, calling it again completes it.
	Restore(ctx context.Context, keyring keys.Secret, records []keys.Record, by uint32) (live, invalidated int, err error)
}

// Store stores the records of the keys and the audit log. A *store.Store implements it.
type Store interface {
	// OpenSnapshot returns the current content of the store for copying. Writers may wait until it is closed.
	OpenSnapshot() (interface {
		io.WriterTo
		io.Closer
	}, error)
	// OpenAudit returns the current content of the audit log.
	OpenAudit() (io.ReadCloser, error)
	Audit(e audit.Event) error
}

// Options are the dependencies of a Service.
type Options struct {
	// Dir is the state directory.
	Dir   string
	Keys  Keys
	Store Store
	// ReadKeys reads the keys from a file with a snapshot of a Store. It may change the file.
	ReadKeys func(path string) ([]keys.Record, error)
	Log      *slog.Logger
}

// Service writes and reads archives. It is safe for concurrent use.
type Service struct {
	Options
	restoring sync.Mutex
	// restorePending is set while the pendingRestore of a finished restore may still be on the disk, so that the next
	// start would complete that restore again. restoring guards it.
	restorePending bool
}

// New returns a Service.
func New(o Options) *Service { return &Service{Options: o} }

// Write writes an archive to w. by is the uid of the local user who requested it. Keys can be changed while Write runs,
// however slow w is.
func (s *Service) Write(ctx context.Context, w io.Writer, by uint32) error {
	temp, err := createTemp(s.Dir)
	if err != nil {
		return fmt.Errorf("create backup: %w: %w", err, errdefs.ErrUnavailable)
	}
	defer temp.Close()
	if err := os.Remove(temp.Name()); err != nil { // the file remains usable until it is closed
		return fmt.Errorf("create backup: %w: %w", err, errdefs.ErrUnavailable)
	}
	m, keyring, err := s.collect(temp)
	if err != nil {
		return fmt.Errorf("create backup: %w: check the free disk space of %s: %w", err, s.Dir, errdefs.ErrUnavailable)
	}
	// Log first, so that no byte of a backup leaves the server without an audit entry.
	err = s.Store.Audit(audit.Event{Action: audit.ServerBackup, Actor: audit.ActorUID(by), Target: m.SigningKeyID})
	if err != nil {
		return fmt.Errorf("create backup: %w", err)
	}
	dbSize, logSize := m.Members[1].Size, m.Members[2].Size
	err = writeArchive(ctxio.Writer(ctx, w), m,
		strings.NewReader(keyring.Reveal()), io.NewSectionReader(temp, 0, dbSize), io.NewSectionReader(temp, dbSize, logSize))
	if err != nil {
		return fmt.Errorf("write backup: %w", err)
	}
	return nil
}

// collect copies the store and then the audit log to temp, both as they were at the same moment. It returns the archive's
// manifest and the keyring of that moment.
func (s *Service) collect(temp io.Writer) (m manifest, keyring keys.Secret, err error) {
	m = manifest{Format: formatName, Version: formatVersion}
	var (
		auditLog io.ReadCloser
		snapshot interface {
			io.WriterTo
			io.Closer
		}
	)
	// Open both within Snapshot, so that they agree, but copy them after it, so that a revocation does not wait for the
	// copy.
	err = s.Keys.Snapshot(func(k keys.Secret) (err error) {
		keyring = k
		signingKey := s.Keys.SigningKey()
		m.TakenAt, m.InstanceID, m.SigningKeyID = time.Now().UTC().Truncate(time.Second), signingKey.InstanceID, signingKey.ID
		if auditLog, err = s.Store.OpenAudit(); err != nil {
			return err
		}
		snapshot, err = s.Store.OpenSnapshot()
		return err
	})
	if auditLog != nil {
		defer auditLog.Close()
	}
	if err != nil {
		return m, keyring, err
	}
	sum := sha256.New()
	size, err := snapshot.WriteTo(io.MultiWriter(temp, sum))
	if err = errors.Join(err, snapshot.Close()); err != nil {
		return m, keyring, err
	}
	storeMember := member{Name: storeName, Size: size, SHA256: digest(sum)}
	keyringMember, err := copyMember(keyringName, io.Discard, strings.NewReader(keyring.Reveal()))
	if err != nil {
		return m, keyring, err
	}
	auditMember, err := copyMember(auditName, temp, auditLog)
	m.Members = []member{keyringMember, storeMember, auditMember}
	return m, keyring, err
}

// Restore reads an archive to the end of r and restores its keys. by is the uid of the local user who requested it. See
// keys.Issuer.Restore for what happens to the present keys. Sandboxes are not affected. Restore changes nothing unless the
// entire archive is valid. It returns errdefs.ErrInvalidArgument if r is not an archive,
// errdefs.ErrFailedPrecondition if a newer version wrote it, and errdefs.ErrDataLoss if it is damaged. If a crash
// interrupts a restore, the next start completes it.
func (s *Service) Restore(ctx context.Context, r io.Reader, by uint32) (keys.Restored, error) {
	if !s.restoring.TryLock() {
		return keys.Restored{}, errRestoring
	}
	defer s.restoring.Unlock()
	pending, err := s.read(ctxio.Reader(ctx, r))
	if err != nil {
		return keys.Restored{}, err
	}
	pending.By = by
	pending.ReplacedKeyID = s.Keys.SigningKey().ID
	s.restorePending = true // until the file is removed
	if err := pending.save(s.Dir); err != nil {
		return keys.Restored{}, fmt.Errorf("%w: nothing was changed; check the disk of %s: %w", err, s.Dir, errdefs.ErrUnavailable)
	}
	// Ignore the cancellation of ctx from here on, because a restore must not stop halfway.
	live, invalidated, err := s.Keys.Restore(context.WithoutCancel(ctx), pending.keyring(), pending.Records, by)
	// The caller gets the result, so the next start must not complete this restore. If the file cannot be removed, the
	// next start restores again, unless the signing key was replaced since. After a successful restore, that would
	// only bring back pruned keys, so Prune waits until the file is removed. After a failed one, it may succeed.
	removeErr := removePending(s.Dir)
	if s.restorePending = removeErr != nil; s.restorePending {
		s.Log.Error("could not remove the file of a finished restore; the next start will restore the backup again", "err", removeErr)
	}
	if err != nil && s.restorePending {
		err = fmt.Errorf("%w; the next start of msbd will try the restore again, because %s could not be removed (%v): remove it "+
			"if you do not want that", err, pendingPath(s.Dir), removeErr)
	}
	if err != nil {
		return keys.Restored{}, err
	}
	return keys.Restored{TakenAt: pending.TakenAt, Live: live, Invalidated: invalidated}, nil
}

// Prune is like Keys.Prune, but refuses to remove keys while the next start might complete a restore, which would bring
// them back. It then returns errdefs.ErrFailedPrecondition (a restore is running) or errdefs.ErrUnavailable (the file of
// the last restore cannot be removed).
func (s *Service) Prune(ctx context.Context, deadFor string, dryRun bool, by uint32) ([]keys.Key, error) {
	if dryRun {
		return s.Keys.Prune(ctx, deadFor, dryRun, by)
	}
	if !s.restoring.TryLock() {
		return nil, errRestoring
	}
	defer s.restoring.Unlock()
	if s.restorePending {
		if err := removePending(s.Dir); err != nil {
			return nil, fmt.Errorf("prune keys: %s is left from the last restore and could not be removed, so the next start "+
				"would bring back pruned keys; remove it first: %w: %w", pendingPath(s.Dir), err, errdefs.ErrUnavailable)
		}
		s.restorePending = false
	}
	return s.Keys.Prune(ctx, deadFor, dryRun, by)
}

var errRestoring = fmt.Errorf("a backup is being restored: wait until that is done: %w", errdefs.ErrFailedPrecondition)

// read reads an archive and the keys in it.
func (s *Service) read(r io.Reader) (_ *pendingRestore, err error) {
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
		return nil, fmt.Errorf("read the store in the backup: %w", err)
	}
	return &pendingRestore{TakenAt: m.TakenAt, SigningKeyID: m.SigningKeyID, Keyring: []byte(keyring.Reveal()), Records: records}, nil
}

// Complete completes a restore that a crash interrupted, and removes leftover temporary files. Call it before the keys
// are opened for use, so that a reset at startup comes after the restore. open opens the keys without a reset.
func Complete(ctx context.Context, dir string, open func() (Keys, error), log *slog.Logger) error {
	if err := removeTemps(dir); err != nil {
		return fmt.Errorf("remove temporary files of a backup: %w", err)
	}
	pending, err := loadPending(dir)
	if pending == nil || err != nil {
		return err
	}
	incomplete := func(err error) error {
		return fmt.Errorf("complete an interrupted restore: %w: to abandon it, remove %s; then restore the backup again",
			err, pendingPath(dir))
	}
	keys, err := open()
	if err != nil {
		return incomplete(err)
	}
	// If the signing key was reset after the crash, the keys of the backup must not become valid again.
	if id := keys.SigningKey().ID; id != pending.ReplacedKeyID && id != pending.SigningKeyID {
		log.Warn("abandoned an interrupted restore, because the signing key was replaced since", "taken_at", pending.TakenAt)
		return removePending(dir)
	}
	live, invalidated, err := keys.Restore(ctx, pending.keyring(), pending.Records, pending.By)
	switch {
	case errdefs.IsDataLoss(err), errdefs.IsFailedPrecondition(err):
		// Restore changed nothing, and would fail again at the next start.
		log.Error("abandoned an interrupted restore: restore the backup again", "taken_at", pending.TakenAt, "err", err)
	case err != nil:
		return incomplete(err)
	default:
		log.Warn("completed an interrupted restore", "taken_at", pending.TakenAt, "live", live, "invalidated", invalidated)
	}
	return removePending(dir)
}
