package store

import (
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// OpenSnapshot returns the current content of the store for copying. ReadKeys can read the copy. Writes can continue
// while the snapshot is open, but close it soon: a write that must grow the file waits for Close.
func (s *Store) OpenSnapshot() (interface {
	io.WriterTo
	io.Closer
}, error) {
	tx, err := s.db.Begin(false)
	if err != nil {
		return nil, fmt.Errorf("copy store: %w", err)
	}
	return snapshot{tx}, nil
}

type snapshot struct{ tx *bbolt.Tx }

func (s snapshot) WriteTo(w io.Writer) (int64, error) {
	n, err := s.tx.WriteTo(w)
	if err != nil {
		err = fmt.Errorf("copy store: %w", err)
	}
	return n, err
}

func (s snapshot) Close() error { return s.tx.Rollback() }

// ReadKeys returns the keys in a copy of a store, of this or an earlier schema. It may change the file at path, which
// no one else may use meanwhile. It returns errdefs.ErrDataLoss if the file is damaged, and
// errdefs.ErrFailedPrecondition if its schema is newer.
func ReadKeys(path string) (records []keys.Record, err error) {
	db, _, err := openFile(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	var saved keys.Saved
	err = db.View(func(tx *bbolt.Tx) error {
		saved, err = loadKeys(tx)
		return err
	})
	if errdefs.IsDataLoss(err) {
		return nil, fmt.Errorf("store %s: %w", path, err)
	}
	return saved.Records, err
}
