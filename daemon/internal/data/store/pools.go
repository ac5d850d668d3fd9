package store

import (
	"go.etcd.io/bbolt"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// PutPool implements sandbox.Store.
func (s *Store) PutPool(p sandbox.PoolSize) error {
	encoded, err := encode(poolBucket, p.Template.String(), p)
	if err != nil {
		return err
	}
	return s.writes.update(func(c *change) error { return c.put(encoded) })
}

// DeletePool implements sandbox.Store.
func (s *Store) DeletePool(t sandbox.Template) error {
	return s.writes.update(func(c *change) error { return c.delete(poolBucket, t.String()) })
}

// Pools implements sandbox.Store.
func (s *Store) Pools() ([]sandbox.PoolSize, error) {
	var sizes []sandbox.PoolSize
	err := s.db.View(func(tx *bbolt.Tx) error {
		return each(tx, poolBucket, func(id string, value []byte) error {
			var p sandbox.PoolSize
			if err := decode(poolBucket, id, value, &p); err != nil {
				return err
			}
			sizes = append(sizes, p)
			return nil
		})
	})
	if err != nil {
		return nil, damaged(s.db.Path(), err)
	}
	return sizes, nil
}
