package store

import (
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"go.etcd.io/bbolt"

	"github.com/msbd/msbd/daemon/internal/sandbox"
	"github.com/msbd/msbd/daemon/internal/token"
)

var (
	_ token.Store   = (*Store)(nil)
	_ sandbox.Store = (*Store)(nil)
)

// AddKey implements token.Store.
func (s *Store) AddKey(r token.Record) error {
	value, err := encode(keyBucket, r.ID, r)
	if err != nil {
		return err
	}
	return s.writes.update(func(tx *bbolt.Tx) error {
		keys := tx.Bucket(keyBucket)
		if keys.Get([]byte(r.ID)) != nil {
			return fmt.Errorf("key %s: %w", r.ID, errdefs.ErrAlreadyExists)
		}
		return keys.Put([]byte(r.ID), value)
	})
}

// Keys implements token.Store.
func (s *Store) Keys() ([]token.Record, error) {
	return all(s.db, keyBucket, func(r token.Record) string { return r.ID })
}

// RevokeKeysNotSignedBy implements token.Store.
func (s *Store) RevokeKeysNotSignedBy(signingKeyID string, at time.Time) error {
	return s.writes.update(func(tx *bbolt.Tx) error {
		keys := tx.Bucket(keyBucket)
		records, err := values(keys, keyBucket, func(r token.Record) string { return r.ID })
		if err != nil {
			return err
		}
		for _, r := range records {
			if r.Revoked() || r.SigningKeyID == signingKeyID {
				continue
			}
			r.RevokedAt = at
			value, err := encode(keyBucket, r.ID, r)
			if err != nil {
				return err
			}
			if err := keys.Put([]byte(r.ID), value); err != nil {
				return err
			}
		}
		return nil
	})
}

// PutSandbox implements sandbox.Store.
func (s *Store) PutSandbox(r sandbox.Record) error {
	value, err := encode(sandboxBucket, r.ID, r)
	if err != nil {
		return err
	}
	return s.writes.update(func(tx *bbolt.Tx) error { return tx.Bucket(sandboxBucket).Put([]byte(r.ID), value) })
}

// DeleteSandbox implements sandbox.Store. An unknown id is no error.
func (s *Store) DeleteSandbox(id string) error {
	return s.writes.update(func(tx *bbolt.Tx) error { return tx.Bucket(sandboxBucket).Delete([]byte(id)) })
}

// Sandboxes implements sandbox.Store.
func (s *Store) Sandboxes() ([]sandbox.Record, error) {
	return all(s.db, sandboxBucket, func(r sandbox.Record) string { return r.ID })
}

// check reads everything once, so that damage is found at the start and not at the first request.
func check(db *bbolt.DB) error {
	s := Store{db: db}
	if _, err := s.Keys(); err != nil {
		return err
	}
	_, err := s.Sandboxes()
	return err
}

func encode(bucket []byte, id string, record any) ([]byte, error) {
	if id == "" {
		return nil, fmt.Errorf("%s: record without an id: %w", bucket, errdefs.ErrInvalidArgument)
	}
	value, err := json.Marshal(record)
	if err != nil {
		return nil, fmt.Errorf("encode %s %s: %w", bucket, id, err)
	}
	return value, nil
}

func all[R any](db *bbolt.DB, bucket []byte, id func(R) string) (records []R, err error) {
	err = db.View(func(tx *bbolt.Tx) error {
		records, err = values(tx.Bucket(bucket), bucket, id)
		return err
	})
	return records, err
}

// values decodes a bucket strictly: a record that is not as we write them is errdefs.ErrDataLoss.
func values[R any](b *bbolt.Bucket, name []byte, id func(R) string) ([]R, error) {
	if b == nil {
		return nil, fmt.Errorf("bucket %s is gone: %w", name, errdefs.ErrDataLoss)
	}
	var records []R
	err := b.ForEach(func(key, value []byte) error {
		var r R
		if err := json.Unmarshal(value, &r, json.RejectUnknownMembers(true)); err != nil {
			return fmt.Errorf("record %s %q is damaged: %w: %w", name, key, err, errdefs.ErrDataLoss)
		}
		if id(r) != string(key) {
			return fmt.Errorf("record %s %q says that it is %q: %w", name, key, id(r), errdefs.ErrDataLoss)
		}
		records = append(records, r)
		return nil
	})
	return records, err
}
