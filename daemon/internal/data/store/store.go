// Package store stores the state that must outlive the daemon, except the signing key. The records of API keys and
// sandboxes are in one bbolt file, the audit log is in another file. Store implements keys.Store and sandbox.Store.
//
// An acknowledged write is on the disk, and so are its audit entries. If a failing disk leaves it unknown whether a
// write is on the disk, that write returns an error and every later write is refused; the next Open finds the write
// either complete or absent. A full disk is a lesser failure: writes succeed again once there is space. Every record
// has a checksum, so that damage is detected and damaged data is never used.
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
	// openTimeout is how long to wait for a backup tool that holds the file. Another daemon is already refused
	// by the lock of the state directory.
	openTimeout = 2 * time.Second
)

// Store is the open store of a state directory, which stays locked until Close. It is safe for concurrent use.
type Store struct {
	db     *bbolt.DB
	lock   *os.File
	log    *auditLog
	writes *committer
	disk   *disk
}

// Open locks the state directory, creating it if needed, and opens the store in it. It returns
// errdefs.ErrFailedPrecondition if another process uses the directory or a newer version wrote the store, and
// errdefs.ErrDataLoss if the store is damaged. Open never replaces a file that it cannot read. It succeeds even if the
// audit log is damaged: see AuditProblem and Health. The program's main must call RunCheckIfChild.
func Open(stateDir string) (_ *Store, err error) {
	if err := durable.MkdirAll(stateDir, 0o700); err != nil {
		return nil, fmt.Errorf("create state directory: %w", err)
	}
	lock, err := lockDir(stateDir)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(stateDir, fileName)
	if err := create(path); err != nil {
		return nil, errors.Join(fmt.Errorf("create store %s: %w", path, err), unlock(lock))
	}
	db, fellBack, err := openFile(path)
	if err != nil {
		return nil, errors.Join(err, unlock(lock))
	}
	disk := &disk{dir: stateDir}
	writes, err := newCommitter(db, filepath.Join(stateDir, logName), disk.release)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open store: %w", err), db.Close(), unlock(lock))
	}
	if err := writes.log.begin(fellBack); err != nil {
		err = fmt.Errorf("its last change is unreadable and may have been acknowledged: %w", err)
		return nil, errors.Join(damaged(path, err), writes.log.close(), db.Close(), unlock(lock))
	}
	return &Store{db: db, lock: lock, log: writes.log, writes: writes, disk: disk}, nil
}

// Close closes the store and unlocks the state directory.
func (s *Store) Close() error { return errors.Join(s.db.Close(), s.log.close(), unlock(s.lock)) }

// create creates an empty store at path, unless a file exists there. It renames a complete file into place, so that a
// crash leaves no partial store.
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

// openFile opens an existing store. fellBack reports whether its last state was unreadable, so that the store is as it
// was before its last change.
func openFile(path string) (db *bbolt.DB, fellBack bool, err error) {
	if err = checkFile(path); err == nil {
		db, err = bbolt.Open(path, 0o600, &bbolt.Options{
			Timeout: openTimeout, FreelistType: bbolt.FreelistMapType,
			// The first time that bbolt needs a longer file, it makes it as long as the mapping, even if the file is longer.
			// This must not cut off the reserve of a small store.
			InitialMmapSize: 2 * storeReserve,
		})
	}
	switch _, isIO := errors.AsType[*fs.PathError](err); {
	case errors.Is(err, bbolt.ErrTimeout):
		return nil, false, fmt.Errorf("open store %s: another process has locked it: %w", path, errdefs.ErrFailedPrecondition)
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
		err = db.View(checkContents)
	}
	if err != nil {
		return nil, false, errors.Join(damaged(path, err), db.Close())
	}
	return db, fellBack, nil
}

// damaged wraps an error of the store at path. If the error is errdefs.ErrDataLoss, it adds what to do about it.
func damaged(path string, err error) error {
	if !errdefs.IsDataLoss(err) {
		return fmt.Errorf("open store %s: %w", path, err)
	}
	return fmt.Errorf("store %s is damaged (%w): restore the file from a backup, or move it away to start "+
		"without API keys: %w", path, err, errdefs.ErrDataLoss)
}

// unlock releases the lock explicitly: closing the file is not enough while a child process that is being forked
// still has a copy of the descriptor.
func unlock(lock *os.File) error {
	return errors.Join(unix.Flock(int(lock.Fd()), unix.LOCK_UN), lock.Close())
}

// lockDir locks the state directory against a second daemon. The kernel releases the lock when the process ends, even
// after a crash. The pid in the file is only for the error message.
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
	pid := fmt.Sprintln(os.Getpid())
	if err == nil { // in this order, the file keeps its block, so that msbd can start on a full disk
		_, err = f.WriteAt([]byte(pid), 0)
	}
	if err == nil {
		err = f.Truncate(int64(len(pid)))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f, nil
}
