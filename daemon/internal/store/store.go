// Package store keeps what must outlive the daemon, but for the signing key: the records of API keys
// and of sandboxes, in one bbolt file. It satisfies the Store interfaces of the two domains; only the
// wiring opens it. A write that was acknowledged is on the disk.
package store

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
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
	writes *committer
}

// Open locks the state directory, making it if needed, and opens the store in it. A directory that
// another process uses is errdefs.ErrFailedPrecondition, as is a store of a newer version; a damaged
// one is errdefs.ErrDataLoss. Nothing is ever recreated in place of what cannot be read.
func Open(stateDir string) (*Store, error) {
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	lock, err := lockDir(stateDir)
	if err != nil {
		return nil, err
	}
	db, err := openFile(filepath.Join(stateDir, fileName))
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return &Store{db: db, lock: lock, writes: newCommitter(db)}, nil
}

// Close releases the state directory.
func (s *Store) Close() error { return errors.Join(s.db.Close(), s.lock.Close()) }

func openFile(path string) (db *bbolt.DB, err error) {
	// bbolt makes a store of an empty file; it never leaves one.
	if info, err := os.Stat(path); err == nil && info.Size() == 0 {
		return nil, damaged(path, errors.New("empty file"))
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	// bbolt trusts its pages: of a damaged file it panics or reads beyond the mapping.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = damaged(path, fmt.Errorf("%v", p))
		}
	}()
	db, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: openTimeout, FreelistType: bbolt.FreelistMapType})
	switch {
	case errors.Is(err, bbolt.ErrTimeout):
		return nil, fmt.Errorf("open store %s: another process holds it: %w", path, errdefs.ErrFailedPrecondition)
	case errors.Is(err, bbolt.ErrInvalid), errors.Is(err, bbolt.ErrVersionMismatch), errors.Is(err, bbolt.ErrChecksum):
		return nil, damaged(path, err)
	case err != nil:
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	if err = migrate(db); err == nil {
		err = check(db)
	}
	if errdefs.IsDataLoss(err) {
		return nil, errors.Join(damaged(path, err), db.Close())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open store %s: %w", path, err), db.Close())
	}
	return db, nil
}

func damaged(path string, err error) error {
	return fmt.Errorf("store %s is damaged (%w): put it back from a backup, or move it away to begin without "+
		"API keys: %w", path, err, errdefs.ErrDataLoss)
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
