package store

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"go.etcd.io/bbolt"
)

var (
	metaBucket    = []byte("meta")
	keyBucket     = []byte("keys")
	usageBucket   = []byte("usage")
	sandboxBucket = []byte("sandboxes")
	outboxBucket  = []byte("outbox")
	segmentBucket = []byte("segments")
	poolBucket    = []byte("pools")

	buckets = [][]byte{metaBucket, keyBucket, usageBucket, sandboxBucket, outboxBucket, segmentBucket, poolBucket}
	// recordBuckets are the buckets whose values have checksums and which have a tally.
	recordBuckets = [][]byte{keyBucket, usageBucket, sandboxBucket, segmentBucket, poolBucket}

	// schemaKey is the key of the schema version. Only this value has no checksum, because every version must be able to
	// read it.
	schemaKey = []byte("schema")
)

// Keys of the meta bucket besides schemaKey and the tallies.
const (
	latestKey = "latest" // the latest time that the server has used and that is confirmed
	logEndKey = "audit"  // the logEnd
	// problemsKey is the key of the problems of the audit log, a []string. Those that an administrator has acknowledged begin
	// with acknowledgedMark.
	problemsKey      = "audit/problems"
	acknowledgedMark = "acknowledged: "
)

func metaKeys() [][]byte {
	keys := [][]byte{[]byte(latestKey), []byte(logEndKey), []byte(problemsKey)}
	for _, bucket := range recordBuckets {
		keys = append(keys, []byte(tallyKey(bucket)))
	}
	return keys
}

// migrations lead from one schema version to the next. The schema version is the number of migrations that were
// applied. Never change a migration that was released, only append new ones. For each, testdata has a fixture of the
// schema before it.
var migrations = []func(*bbolt.Tx) error{
	func(tx *bbolt.Tx) error { return createBuckets(tx, "keys", "sandboxes") },
	migrateTo2,
	migrateTo3,
	// Earlier versions do not know the disks of sandboxes, and would remove sandboxes that have disks.
	func(*bbolt.Tx) error { return nil },
	migrateTo5,
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
		return fmt.Errorf("it was written by a newer msbd (schema %d, this version supports up to %d): install the newer version again: %w",
			version, len(migrations), errdefs.ErrFailedPrecondition)
	case version == len(migrations):
		return nil
	}
	return db.Update(func(tx *bbolt.Tx) error {
		meta, err := tx.CreateBucketIfNotExists(metaBucket)
		if err != nil {
			return err
		}
		for i, migration := range migrations[version:] {
			if err := migration(tx); err != nil {
				return fmt.Errorf("migrate to schema %d: %w", version+i+1, err)
			}
		}
		return meta.Put(schemaKey, []byte(strconv.Itoa(len(migrations))))
	})
}

// schemaVersion returns the schema version of the store, 0 for an empty one.
func schemaVersion(tx *bbolt.Tx) (int, error) {
	meta := tx.Bucket(metaBucket)
	if meta == nil {
		if name, _ := tx.Cursor().First(); name != nil {
			return 0, fmt.Errorf("it has a bucket %q but no schema version: %w", name, errdefs.ErrDataLoss)
		}
		return 0, nil
	}
	version, err := strconv.Atoi(string(meta.Get(schemaKey)))
	if err != nil || version < 1 {
		return 0, fmt.Errorf("invalid schema version %q: %w", meta.Get(schemaKey), errdefs.ErrDataLoss)
	}
	return version, nil
}

func createBuckets(tx *bbolt.Tx, names ...string) error {
	for _, name := range names {
		if _, err := tx.CreateBucket([]byte(name)); err != nil {
			return fmt.Errorf("create bucket %s: %w: %w", name, err, errdefs.ErrDataLoss)
		}
	}
	return nil
}

// keyV1 and keyV2 are the key records of schema 1 and schema 2. They stay as they are when keys.Record changes.
type keyV1 struct {
	ID           string    `json:"id"`
	Namespace    string    `json:"namespace,omitempty"`
	Scopes       []string  `json:"scopes,omitempty"`
	CreatedAt    time.Time `json:"created_at"`
	CreatedBy    uint32    `json:"created_by"`
	ExpiresAt    time.Time `json:"expires_at,omitzero"`
	SigningKeyID string    `json:"signing_key_id"`
	RevokedAt    time.Time `json:"revoked_at,omitzero"`
}

type keyV2 struct {
	ID           string    `json:"id"`
	Namespaces   []string  `json:"namespaces,omitempty"`
	Scopes       []string  `json:"scopes,omitempty"`
	CreatedAt    time.Time `json:"created_at"`
	CreatedBy    uint32    `json:"created_by"`
	ExpiresAt    time.Time `json:"expires_at,omitzero"`
	SigningKeyID string    `json:"signing_key_id"`
	RevokedAt    time.Time `json:"revoked_at,omitzero"`
	Revocation   string    `json:"revocation,omitempty"`
}

// migrateTo2 turns each key's namespace into a list and records how the key was revoked. It adds a checksum to every
// record, the bucket for the usage of keys, and the audit log.
func migrateTo2(tx *bbolt.Tx) error {
	if err := createBuckets(tx, "usage", "outbox"); err != nil {
		return err
	}
	c := newChange(tx)
	for _, bucket := range []string{"keys", "usage", "sandboxes"} {
		if err := c.putMeta("tally/"+bucket, tally{}); err != nil {
			return err
		}
	}
	if err := c.putMeta("audit", logEnd{}); err != nil {
		return err
	}
	if err := c.putMeta("latest", time.Time{}); err != nil {
		return err
	}
	err := replaceAll(c, "keys", func(id string, old []byte) ([]byte, error) {
		var v1 keyV1
		if err := decode([]byte("keys"), id, old, &v1); err != nil {
			return nil, err
		}
		if v1.ID != id {
			return nil, fmt.Errorf("record keys %q has the id %q: %w", id, v1.ID, errdefs.ErrDataLoss)
		}
		v2 := keyV2{
			ID: v1.ID, Scopes: v1.Scopes, CreatedAt: v1.CreatedAt, CreatedBy: v1.CreatedBy,
			ExpiresAt: v1.ExpiresAt, SigningKeyID: v1.SigningKeyID, RevokedAt: v1.RevokedAt,
		}
		if v1.Namespace != "" {
			v2.Namespaces = []string{v1.Namespace}
		}
		if !v1.RevokedAt.IsZero() {
			v2.Revocation = "reset" // schema 1 had no other way to revoke a key
		}
		return json.Marshal(v2)
	})
	if err != nil {
		return err
	}
	err = replaceAll(c, "sandboxes", func(id string, old []byte) ([]byte, error) {
		if !jsontext.Value(old).IsValid() {
			return nil, fmt.Errorf("record sandboxes %q is damaged: %w", id, errdefs.ErrDataLoss)
		}
		return old, nil
	})
	if err != nil {
		return err
	}
	return c.finish()
}

// replaceAll rewrites every value of a schema 1 bucket, whose values have no checksum: it calls replace with each old value
// and stores the result with a checksum.
func replaceAll(c *change, bucket string, replace func(id string, old []byte) ([]byte, error)) error {
	b := c.tx.Bucket([]byte(bucket))
	if b == nil {
		return fmt.Errorf("bucket %s is missing: %w", bucket, errdefs.ErrDataLoss)
	}
	records := make(map[string][]byte)
	err := b.ForEach(func(key, old []byte) error {
		value, err := replace(string(key), old)
		records[string(key)] = slices.Clone(value)
		return err
	})
	if err != nil {
		return err
	}
	for id, value := range records {
		if err := b.Delete([]byte(id)); err != nil {
			return err
		}
		if err := c.put(record{bucket: []byte(bucket), id: id, sealed: seal([]byte(bucket), id, value)}); err != nil {
			return err
		}
	}
	return nil
}

// migrateTo3 adds the sealed segments of the audit log, and its problems.
func migrateTo3(tx *bbolt.Tx) error {
	if err := createBuckets(tx, "segments"); err != nil {
		return err
	}
	c := newChange(tx)
	if err := c.putMeta("tally/segments", tally{}); err != nil {
		return err
	}
	return c.putMeta("audit/problems", []string{})
}

// migrateTo5 adds the sizes of pools. Earlier versions do not know microVMs that are in a pool.
func migrateTo5(tx *bbolt.Tx) error {
	if err := createBuckets(tx, "pools"); err != nil {
		return err
	}
	return newChange(tx).putMeta("tally/pools", tally{})
}
