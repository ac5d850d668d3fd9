// Package store keeps what must outlive the daemon, except the signing key: the records of API keys and of
// sandboxes, in one bbolt file, and the audit log. It implements the Store interfaces of the two domains.
//
// A write that was acknowledged is on the disk, and so is what it logs. If the disk fails so that nobody
// knows whether it has a write, that write is not acknowledged, every later write is refused, and the next
// Open finds the write made or not. A full disk is no such failure: writes go on once there is room.
// Every record carries a checksum, and nothing damaged is taken for good.
package store

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/durable"
)

const (
	fileName = "msb.db"
	// openTimeout is for a backup tool that holds the file; another daemon is refused by the lock.
	openTimeout = 2 * time.Second
)

// Store is an open state directory. It is safe for concurrent use.
type Store struct {
	db     *bbolt.DB
	lock   *os.File
	log    *auditLog
	writes *committer
}

// Open locks the state directory, making it if needed, and opens the store in it. A directory that
// another process uses is errdefs.ErrFailedPrecondition, as is a store of a newer version; a damaged
// one is errdefs.ErrDataLoss. Nothing is ever recreated in place of what cannot be read. A damaged audit
// log does not keep the store from opening: see AuditProblem and Health. The main of the program must call
// MaybeCheckChild.
func Open(stateDir string) (_ *Store, err error) {
	if err := durable.MkdirAll(stateDir, 0o700); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	lock, err := lockDir(stateDir)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(stateDir, fileName)
	if err := create(path); err != nil {
		return nil, errors.Join(fmt.Errorf("make store %s: %w", path, err), unlock(lock))
	}
	db, fellBack, err := openFile(path)
	if err != nil {
		return nil, errors.Join(err, unlock(lock))
	}
	writes := newCommitter(db, filepath.Join(stateDir, logName))
	if err := writes.log.begin(fellBack); err != nil {
		err = fmt.Errorf("its last change is unreadable, and the audit log does not show that it was not acknowledged: %w", err)
		return nil, errors.Join(damaged(path, err), writes.log.close(), db.Close(), unlock(lock))
	}
	return &Store{db: db, lock: lock, log: writes.log, writes: writes}, nil
}

// Close releases the state directory.
func (s *Store) Close() error { return errors.Join(s.db.Close(), s.log.close(), unlock(s.lock)) }

// create makes a store, unless there is one. It appears whole.
func create(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	temp := path + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	db, err := bbolt.Open(temp, 0o600, nil)
	if err != nil {
		return err
	}
	if err := errors.Join(migrate(db), db.Close()); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

// openFile opens a store that exists. If its last state was unreadable, so that the store is as it was
// before the last change, fellBack is true.
func openFile(path string) (db *bbolt.DB, fellBack bool, err error) {
	if err = checkFile(path); err == nil {
		db, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: openTimeout, FreelistType: bbolt.FreelistMapType})
	}
	switch _, isIO := errors.AsType[*fs.PathError](err); {
	case errors.Is(err, bbolt.ErrTimeout):
		return nil, false, fmt.Errorf("open store %s: another process holds it: %w", path, errdefs.ErrFailedPrecondition)
	case isIO:
		return nil, false, err
	case err != nil:
		return nil, false, damaged(path, err)
	}
	if fellBack, err = lostState(path, db.Info().PageSize); err == nil {
		err = syncState(path, db.Info().PageSize)
	}
	if err == nil {
		err = migrate(db)
	}
	if err == nil {
		err = db.View(check)
	}
	if err != nil {
		return nil, false, errors.Join(damaged(path, err), db.Close())
	}
	return db, fellBack, nil
}

// damaged says of an error that is errdefs.ErrDataLoss what to do about it.
func damaged(path string, err error) error {
	if !errdefs.IsDataLoss(err) {
		return fmt.Errorf("open store %s: %w", path, err)
	}
	return fmt.Errorf("store %s is damaged (%w): put it back from a backup, or move it away to begin "+
		"without API keys: %w", path, err, errdefs.ErrDataLoss)
}

// unlock does not leave it to Close, after which a child that is just being forked still has the file.
func unlock(lock *os.File) error {
	return errors.Join(unix.Flock(int(lock.Fd()), unix.LOCK_UN), lock.Close())
}

// lockDir keeps a second daemon away. The lock is the kernel's: it goes with the process, however
// that ends. The pid in the file is only for the message.
func lockDir(stateDir string) (*os.File, error) {
	path := filepath.Join(stateDir, "msbd.lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		pid, _ := io.ReadAll(io.LimitReader(f, 20))
		f.Close()
		return nil, fmt.Errorf("state directory %s is in use by another msbd (pid %s, lock %s): stop it with "+
			"'msb server stop', or use another --state-dir: %w",
			stateDir, bytes.TrimSpace(pid), path, errdefs.ErrFailedPrecondition)
	}
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = fmt.Fprintln(f, os.Getpid())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f, nil
}
