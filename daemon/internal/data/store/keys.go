package store

import (
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

var _ keys.Store = (*Store)(nil)

// LoadKeys implements keys.Store.
func (s *Store) LoadKeys() (keys.Saved, error) {
	var saved keys.Saved
	err := s.db.View(func(tx *bbolt.Tx) (err error) {
		saved, err = loadKeys(tx)
		return err
	})
	if err != nil {
		return keys.Saved{}, damaged(s.db.Path(), err)
	}
	return saved, nil
}

func loadKeys(tx *bbolt.Tx) (keys.Saved, error) {
	ids, records, err := decodeAll[keys.Record](tx, keyBucket)
	if err != nil {
		return keys.Saved{}, err
	}
	for i, id := range ids {
		if records[i].ID != id {
			return keys.Saved{}, fmt.Errorf("record %s %q has the id %q: %w", keyBucket, id, records[i].ID, errdefs.ErrDataLoss)
		}
	}
	users, usage, err := decodeAll[keys.Usage](tx, usageBucket)
	if err != nil {
		return keys.Saved{}, err
	}
	saved := keys.Saved{Records: records, Usage: make(map[string]keys.Usage, len(users))}
	for i, id := range users {
		saved.Usage[id] = usage[i]
	}
	return saved, getMeta(tx, latestKey, &saved.Latest)
}

// CommitKeys implements keys.Store. It returns errdefs.ErrUnavailable if the change cannot be written to the disk.
func (s *Store) CommitKeys(c keys.Change) error {
	records := make([]record, len(c.Put))
	for i, r := range c.Put {
		var err error
		if records[i], err = encode(keyBucket, r.ID, r); err != nil {
			return err
		}
	}
	return s.writes.update(func(change *change) error {
		for _, id := range c.Delete {
			for _, bucket := range [][]byte{keyBucket, usageBucket} {
				if err := change.delete(bucket, id); err != nil {
					return err
				}
			}
		}
		for _, r := range records {
			if err := change.put(r); err != nil {
				return err
			}
		}
		if c.Clock.IsZero() {
			return nil
		}
		return change.putMeta(latestKey, c.Clock)
	}, c.Events...)
}

// SaveUsage implements keys.Store.
func (s *Store) SaveUsage(usage map[string]keys.Usage, latest time.Time) error {
	records := make([]record, 0, len(usage))
	for id, u := range usage {
		r, err := encode(usageBucket, id, u)
		if err != nil {
			return err
		}
		records = append(records, r)
	}
	return s.writes.update(func(change *change) error {
		for _, r := range records {
			if change.tx.Bucket(keyBucket).Get([]byte(r.id)) == nil {
				continue // the key was deleted
			}
			if err := change.put(r); err != nil {
				return err
			}
		}
		var known time.Time
		if err := getMeta(change.tx, latestKey, &known); err != nil || !latest.After(known) {
			return err
		}
		return change.putMeta(latestKey, latest)
	})
}
