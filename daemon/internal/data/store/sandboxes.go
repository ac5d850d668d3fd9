package store

import (
	"fmt"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

var _ sandbox.Store = (*Store)(nil)

// PutSandbox implements sandbox.Store.
func (s *Store) PutSandbox(r sandbox.Record) error {
	encoded, err := encode(sandboxBucket, r.ID, r)
	if err != nil {
		return err
	}
	return s.writes.update(func(c *change) error { return c.put(encoded) })
}

// DeleteSandbox implements sandbox.Store. If there is no record with this id, it does nothing.
func (s *Store) DeleteSandbox(id string) error {
	return s.writes.update(func(c *change) error { return c.delete(sandboxBucket, id) })
}

// Sandboxes implements sandbox.Store.
func (s *Store) Sandboxes() ([]sandbox.Record, error) {
	var records []sandbox.Record
	err := s.db.View(func(tx *bbolt.Tx) error {
		return each(tx, sandboxBucket, func(id string, value []byte) error {
			var r sandbox.Record
			if err := decode(sandboxBucket, id, value, &r); err != nil {
				return err
			}
			if r.ID != id {
				return fmt.Errorf("record %s %q has the id %q: %w", sandboxBucket, id, r.ID, errdefs.ErrDataLoss)
			}
			records = append(records, r)
			return nil
		})
	})
	if err != nil {
		return nil, damaged(s.db.Path(), err)
	}
	return records, nil
}
