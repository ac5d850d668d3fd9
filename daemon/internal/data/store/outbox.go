package store

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"

	"github.com/msbd/msbd/api/audit"
)

// outboxLimit is the number of lines that the outbox may hold before the audit log's file must be synced.
const outboxLimit = 512

// logEnd is the end of the audit log according to the store.
type logEnd struct {
	audit.Head
	// Size is the size of the file up to and including the last entry, in bytes.
	Size int64 `json:"size"`
}

// outbox holds the last lines of the audit log: the file may not have them yet, or may lose them in a power loss.
type outbox struct {
	before audit.Head // the head of the log without the lines
	lines  []byte
	end    logEnd
}

func readOutbox(tx *bbolt.Tx) (outbox, error) {
	var end logEnd
	if err := getMeta(tx, logEndKey, &end); err != nil {
		return outbox{}, err
	}
	b := tx.Bucket(outboxBucket)
	if b == nil {
		return outbox{}, fmt.Errorf("bucket %s is missing: %w", outboxBucket, errdefs.ErrDataLoss)
	}
	o := outbox{before: end.Head, end: end}
	head := end.Head
	err := b.ForEach(func(key, line []byte) error {
		e, err := audit.Parse(bytes.TrimSuffix(line, []byte("\n")))
		if err == nil && len(o.lines) == 0 {
			head = audit.Head{Seq: e.Seq - 1, Hash: e.Prev}
			o.before = head
		}
		if err == nil {
			head, err = head.Follow(e)
		}
		if err == nil && !bytes.Equal(key, outboxKey(e.Seq)) {
			err = fmt.Errorf("it has the number %d", e.Seq)
		}
		if err != nil {
			return fmt.Errorf("audit entry %x: %w: %w", key, err, errdefs.ErrDataLoss)
		}
		o.lines = append(o.lines, line...)
		return nil
	})
	if err == nil && head != end.Head {
		err = fmt.Errorf("the last audit entry is %d, not %d: %w", head.Seq, end.Seq, errdefs.ErrDataLoss)
	}
	return o, err
}

func outboxKey(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }

func emptyOutbox(tx *bbolt.Tx) error {
	if err := tx.DeleteBucket(outboxBucket); err != nil {
		return err
	}
	_, err := tx.CreateBucket(outboxBucket)
	return err
}

// addEvents adds events to the outbox. The caller must have called l.prepare, and must write the returned lines to l after
// the commit.
func (c *change) addEvents(l *auditLog, events []audit.Event) (lines []byte, end logEnd, err error) {
	if err := getMeta(c.tx, logEndKey, &end); err != nil {
		return nil, end, err
	}
	b := c.tx.Bucket(outboxBucket)
	if first, _ := b.Cursor().First(); first != nil && end.Seq-binary.BigEndian.Uint64(first) >= outboxLimit {
		if err := l.sync(); err != nil {
			return nil, end, err
		}
		if err := emptyOutbox(c.tx); err != nil {
			return nil, end, err
		}
		b = c.tx.Bucket(outboxBucket)
	}
	b.FillPercent = 1 // keys are appended in order, so full pages need no space for later inserts
	at := time.Now()
	for _, e := range events {
		line, head, err := end.Append(at, e)
		if err != nil {
			return nil, end, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		if err := b.Put(outboxKey(head.Seq), line); err != nil {
			return nil, end, err
		}
		end = logEnd{Head: head, Size: end.Size + int64(len(line))}
		lines = append(lines, line...)
	}
	if err := l.reserve(len(lines)); err != nil {
		return nil, end, err
	}
	return lines, end, c.putMeta(logEndKey, end)
}
