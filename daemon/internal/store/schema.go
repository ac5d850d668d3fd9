package store

import (
	"fmt"
	"strconv"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
)

var (
	metaBucket    = []byte("meta")
	keyBucket     = []byte("keys")
	sandboxBucket = []byte("sandboxes")

	schemaKey = []byte("schema")
)

// migrations lead from one schema version to the next; the version is how many were applied. What was
// released is never changed, only added to.
var migrations = []func(*bbolt.Tx) error{
	func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{keyBucket, sandboxBucket} {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		return nil
	},
}

// migrate brings the store to the current schema in one transaction.
func migrate(db *bbolt.DB) error {
	var version int
	err := db.View(func(tx *bbolt.Tx) (err error) {
		version, err = schemaVersion(tx)
		return err
	})
	switch {
	case err != nil:
		return err
	case version > len(migrations):
		return fmt.Errorf("it was written by a newer msbd (schema %d, this one knows %d): install that version again: %w",
			version, len(migrations), errdefs.ErrFailedPrecondition)
	case version == len(migrations):
		return nil
	}
	return db.Update(func(tx *bbolt.Tx) error {
		for i, migration := range migrations[version:] {
			if err := migration(tx); err != nil {
				return fmt.Errorf("migrate to schema %d: %w", version+i+1, err)
			}
		}
		meta, err := tx.CreateBucketIfNotExists(metaBucket)
		if err != nil {
			return err
		}
		return meta.Put(schemaKey, []byte(strconv.Itoa(len(migrations))))
	})
}

// schemaVersion is 0 for a store that was just made.
func schemaVersion(tx *bbolt.Tx) (int, error) {
	meta := tx.Bucket(metaBucket)
	if meta == nil {
		if name, _ := tx.Cursor().First(); name != nil {
			return 0, fmt.Errorf("it holds %q but no schema version: %w", name, errdefs.ErrDataLoss)
		}
		return 0, nil
	}
	version, err := strconv.Atoi(string(meta.Get(schemaKey)))
	if err != nil || version < 1 {
		return 0, fmt.Errorf("schema version %q: %w", meta.Get(schemaKey), errdefs.ErrDataLoss)
	}
	return version, nil
}
