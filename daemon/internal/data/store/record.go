package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"runtime"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"
)

// sumSize is the length in bytes of the checksum before each value. The checksums are needed because bbolt does not notice
// if a disk returns other data than was written.
const sumSize = 8

// checksum returns the checksum of a value. It includes the bucket and the id, so that a value is not valid in another
// place.
func checksum(bucket []byte, id string, value []byte) uint64 {
	text := make([]byte, 0, 512) // on the stack, which has room for most records
	text = append(append(text, bucket...), 0)
	text = append(append(text, id...), 0)
	sum := sha256.Sum256(append(text, value...))
	return sumOf(sum[:])
}

func seal(bucket []byte, id string, value []byte) []byte {
	sealed := binary.BigEndian.AppendUint64(make([]byte, 0, sumSize+len(value)), checksum(bucket, id, value))
	return append(sealed, value...)
}

func unseal(bucket []byte, id string, sealed []byte) (value []byte, sum uint64, err error) {
	if len(sealed) > sumSize {
		value, sum = sealed[sumSize:], sumOf(sealed)
		if sum == checksum(bucket, id, value) {
			return value, sum, nil
		}
	}
	return nil, 0, fmt.Errorf("record %s %q has a wrong checksum: %w", bucket, id, errdefs.ErrDataLoss)
}

func sumOf(sealed []byte) uint64 { return binary.BigEndian.Uint64(sealed) }

// record is an entry of a bucket. sealed is what the bucket stores under id: the checksum, followed by the JSON value.
type record struct {
	bucket []byte
	id     string
	sealed []byte
}

func encode(bucket []byte, id string, content any) (record, error) {
	if id == "" {
		return record{}, fmt.Errorf("encode %s: record has no id: %w", bucket, errdefs.ErrInvalidArgument)
	}
	value, err := json.Marshal(content)
	if err != nil {
		return record{}, fmt.Errorf("encode %s %s: %w", bucket, id, err)
	}
	return record{bucket: bucket, id: id, sealed: seal(bucket, id, value)}, nil
}

// decode unmarshals the JSON of a record into content. It returns errdefs.ErrDataLoss if the JSON is invalid or has
// unknown members.
func decode(bucket []byte, id string, value []byte, content any) error {
	if err := json.Unmarshal(value, content, json.RejectUnknownMembers(true)); err != nil {
		return fmt.Errorf("record %s %q is damaged: %w: %w", bucket, id, err, errdefs.ErrDataLoss)
	}
	return nil
}

// tally holds the number of records in a bucket and the sum of their checksums. It reveals that a record is missing or
// was replaced by an earlier version of itself.
type tally struct {
	Count uint64 `json:"count"`
	Sum   uint64 `json:"sum"`
}

func (t *tally) add(sum uint64)    { t.Count, t.Sum = t.Count+1, t.Sum+sum }
func (t *tally) remove(sum uint64) { t.Count, t.Sum = t.Count-1, t.Sum-sum }

func tallyKey(bucket []byte) string { return "tally/" + string(bucket) }

// change is a write transaction. It updates the tallies of the buckets that it changes.
type change struct {
	tx      *bbolt.Tx
	tallies map[string]*tally
}

func newChange(tx *bbolt.Tx) *change { return &change{tx: tx, tallies: make(map[string]*tally)} }

// put adds a record, or replaces the one with the same id.
func (c *change) put(r record) error {
	b, t, err := c.bucket(r.bucket)
	if err != nil {
		return err
	}
	if old := b.Get([]byte(r.id)); old != nil {
		t.remove(sumOf(old))
	}
	t.add(sumOf(r.sealed))
	return b.Put([]byte(r.id), r.sealed)
}

// delete removes a record, if it exists.
func (c *change) delete(bucket []byte, id string) error {
	b, t, err := c.bucket(bucket)
	if err != nil {
		return err
	}
	old := b.Get([]byte(id))
	if old == nil {
		return nil
	}
	t.remove(sumOf(old))
	return b.Delete([]byte(id))
}

func (c *change) bucket(name []byte) (*bbolt.Bucket, *tally, error) {
	b := c.tx.Bucket(name)
	t := c.tallies[string(name)]
	if t == nil {
		t = new(tally)
		if err := getMeta(c.tx, tallyKey(name), t); err != nil {
			return nil, nil, err
		}
		c.tallies[string(name)] = t
	}
	return b, t, nil
}

// finish stores the changed tallies. It must be the last call before the commit.
func (c *change) finish() error {
	for bucket, t := range c.tallies {
		if err := c.putMeta(tallyKey([]byte(bucket)), t); err != nil {
			return err
		}
	}
	return nil
}

func (c *change) putMeta(key string, content any) error {
	r, err := encode(metaBucket, key, content)
	if err != nil {
		return err
	}
	return c.tx.Bucket(metaBucket).Put([]byte(key), r.sealed)
}

func getMeta(tx *bbolt.Tx, key string, content any) error {
	value, _, err := unseal(metaBucket, key, tx.Bucket(metaBucket).Get([]byte(key)))
	if err != nil {
		return err
	}
	return decode(metaBucket, key, value, content)
}

// each calls fn with every record of a bucket. It returns errdefs.ErrDataLoss if a checksum or the tally is wrong.
func each(tx *bbolt.Tx, bucket []byte, fn func(id string, value []byte) error) error {
	b := tx.Bucket(bucket)
	if b == nil {
		return fmt.Errorf("bucket %s is missing: %w", bucket, errdefs.ErrDataLoss)
	}
	var want, found tally
	if err := getMeta(tx, tallyKey(bucket), &want); err != nil {
		return err
	}
	err := b.ForEach(func(key, sealed []byte) error {
		value, sum, err := unseal(bucket, string(key), sealed)
		if err != nil {
			return err
		}
		found.add(sum)
		return fn(string(key), value)
	})
	if err == nil && found != want {
		err = fmt.Errorf("bucket %s has %d records, which differ from the %d that were written: %w",
			bucket, found.Count, want.Count, errdefs.ErrDataLoss)
	}
	return err
}

// decodeAll returns the ids and the contents of all records in a bucket. It uses all processors, because a start with many keys
// would otherwise spend most of its time here.
func decodeAll[T any](tx *bbolt.Tx, bucket []byte) (ids []string, contents []T, err error) {
	var values [][]byte // in the memory of the transaction
	err = each(tx, bucket, func(id string, value []byte) error {
		ids, values = append(ids, id), append(values, value)
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	contents = make([]T, len(values))
	var g errgroup.Group
	share := len(values)/runtime.GOMAXPROCS(0) + 1
	for first := 0; first < len(values); first += share {
		g.Go(func() error {
			for i := first; i < min(first+share, len(values)); i++ {
				if err := decode(bucket, ids[i], values[i], &contents[i]); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return ids, contents, g.Wait()
}

// checkContents reads the entire store, so that damage is found at startup and not by the first request.
func checkContents(tx *bbolt.Tx) error {
	err := tx.ForEach(func(name []byte, _ *bbolt.Bucket) error { return checkKnown("bucket", name, buckets) })
	if err != nil {
		return err
	}
	meta := metaKeys()
	err = tx.Bucket(metaBucket).ForEach(func(key, sealed []byte) error {
		if bytes.Equal(key, schemaKey) {
			return nil
		}
		if err := checkKnown("value", key, meta); err != nil {
			return err
		}
		_, _, err := unseal(metaBucket, string(key), sealed)
		return err
	})
	if err != nil {
		return err
	}
	for _, bucket := range recordBuckets {
		if err := each(tx, bucket, func(string, []byte) error { return nil }); err != nil {
			return err
		}
	}
	_, err = readOutbox(tx)
	return err
}

func checkKnown(what string, name []byte, known [][]byte) error {
	for _, k := range known {
		if bytes.Equal(k, name) {
			return nil
		}
	}
	return fmt.Errorf("unknown %s %q: %w", what, name, errdefs.ErrDataLoss)
}
