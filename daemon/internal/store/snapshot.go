package store

import (
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"

	"github.com/msbd/msbd/daemon/internal/token"
)

// Snapshot writes a copy of the store as it is at this moment, which ReadKeys understands. Changes go on
// meanwhile, but w should not be slow: a store that must grow waits for it.
func (s *Store) Snapshot(w io.Writer) error {
	err := s.db.View(func(tx *bbolt.Tx) error {
		_, err := tx.WriteTo(w)
		return err
	})
	if err != nil {
		return fmt.Errorf("copy store: %w", err)
	}
	return nil
}

// ReadKeys reads the keys of a Snapshot, of this or an earlier schema, in a file that is its own. The
// file may be changed. A damaged one is errdefs.ErrDataLoss, one of a newer schema
// errdefs.ErrFailedPrecondition.
func ReadKeys(path string) (records []token.Record, err error) {
	db, _, err := openFile(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	var saved token.Saved
	err = db.View(func(tx *bbolt.Tx) error {
		saved, err = loadKeys(tx)
		return err
	})
	if errdefs.IsDataLoss(err) {
		return nil, fmt.Errorf("store %s: %w", path, err)
	}
	return saved.Records, err
}
