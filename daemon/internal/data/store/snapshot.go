package store

import (
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// OpenSnapshot returns the store as it is at this moment, to be copied at leisure: ReadKeys understands what
// is written. Changes go on until Close, but what takes long should not hold it: a store that must grow waits.
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

// ReadKeys reads the keys of a Snapshot, of this or an earlier schema, in a file that is its own. The
// file may be changed. A damaged one is errdefs.ErrDataLoss, one of a newer schema
// errdefs.ErrFailedPrecondition.
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
