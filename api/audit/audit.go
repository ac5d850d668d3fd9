// Package audit defines the format of msbd's audit log. Each line is a JSON object with a sequence number and
// the hash of the previous line, so that changed, removed and inserted lines are detected. The server writes the
// log. Anyone can check a copy of it without the server.
//
// The hash of a line can be recomputed with standard command-line tools. For the third line:
//
//	sed -n 3p audit.jsonl | sed 's/,"hash":"[0-9a-f]*"}$//' | tr -d '\n' | sha256sum
//
// The server can divide a log into segments, which are files. The hash chain continues from one segment to the next, so
// each can be checked on its own with [Head.Verify], and [Segment] says where it begins and ends.
//
// A log that was truncated between two lines, or completely rewritten, is consistent in itself. To detect this,
// compare its [Head] with the one that the server has stored.
package audit

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Event is something that happened and is to be logged. It contains no secrets.
type Event struct {
	// Action is what was done, such as "key.create".
	Action string `json:"action"`
	// Actor is who did it: a local user such as "uid:1000", or "server".
	Actor string `json:"actor"`
	// Target is what the action was applied to, such as the id of a key. It may be empty.
	Target string `json:"target,omitempty"`
	// Detail holds further facts about the event, such as the name of a key.
	Detail map[string]string `json:"detail,omitempty"`
}

// The values of Event.Action.
const (
	KeyCreate      = "key.create"
	KeyRevoke      = "key.revoke"
	KeyRotate      = "key.rotate"
	KeyPrune       = "key.prune"
	KeySuspect     = "key.suspect" // a token has a valid signature but matches no record: the signing key may be stolen
	SigningReset   = "signing_key.reset"
	KeysInvalid    = "keys.invalidate" // the keys of an earlier signing key are marked as revoked
	ClockAccept    = "clock.accept"    // the server uses the host's time, although it had used a later one
	ServerStart    = "server.start"
	ServerStop     = "server.stop"
	ServerBackup   = "server.backup"
	ServerRestore  = "server.restore"
	StoreRollback  = "store.rollback"      // the store was set back to before the end of the log: later changes are undone
	SandboxStop    = "sandbox.stop"        // by an administrator
	ImageImport    = "image.import"        // an import began
	ImportFailed   = "image.import_failed" // the import that began last, with the same target, failed
	PoolSet        = "pool.set"            // the size of a pool of microVMs was set
	ImageRemove    = "image.remove"        // the removal of an image began
	RemoveFailed   = "image.remove_failed" // the removal that began last, with the same target, failed
	LogSeal        = "audit.seal"          // a segment of this log was sealed; this entry is the first of the next segment
	LogAcknowledge = "audit.acknowledge"   // an administrator has acknowledged the problems of this log
)

// ActorServer is the Actor of events that the server causes itself.
const ActorServer = "server"

// ActorUID returns the Actor for a local user.
func ActorUID(uid uint32) string { return fmt.Sprintf("uid:%d", uid) }

// Entry is one line of the log.
type Entry struct {
	// Seq counts from 1 without gaps.
	Seq uint64 `json:"seq"`
	// Time is in UTC, truncated to milliseconds.
	Time time.Time `json:"time"`
	Event
	// Prev is the Hash of the previous entry. It is empty in the first entry.
	Prev string `json:"prev"`
	// Hash is the SHA-256, in hex, of the line up to but excluding `,"hash":`.
	Hash string `json:"hash,omitempty"`
}

// Head identifies the last entry of a log. The zero Head is the head of an empty log.
type Head struct {
	Seq  uint64 `json:"seq"`
	Hash string `json:"hash"`
}

// Segment is a sealed part of a log: a file to which nothing is added anymore.
type Segment struct {
	Path string
	// First is the number of its first entry.
	First uint64
	// Last is its last entry.
	Last Head
	// Absent is set if the file does not exist anymore, for example because it was moved to an archive.
	Absent bool
}

// MaxLine is the maximum length of a line in bytes, including its newline.
const MaxLine = 64 << 10

// The part of a line that follows the hashed part is beforeHash, the hash in hex, and afterHash.
const (
	beforeHash = `,"hash":"`
	afterHash  = `"}`
	tailLength = len(beforeHash) + 2*sha256.Size + len(afterHash)
)

// Append returns the line that records e after h, including its newline, and the new head of the log. The same
// input always gives the same bytes. Append fails only if the line would be longer than MaxLine.
func (h Head) Append(at time.Time, e Event) (line []byte, next Head, err error) {
	entry := Entry{Seq: h.Seq + 1, Time: at.UTC().Truncate(time.Millisecond), Event: e, Prev: h.Hash}
	// An event must be logged even if it contains text that is not UTF-8, such as a file name.
	line, err = json.Marshal(entry, json.Deterministic(true), jsontext.AllowInvalidUTF8(true))
	if err != nil {
		return nil, h, fmt.Errorf("encode audit entry %s: %w", e.Action, err)
	}
	line = line[:len(line)-len("}")]
	next = Head{Seq: entry.Seq, Hash: hashOf(line)}
	line = append(append(append(append(line, beforeHash...), next.Hash...), afterHash...), '\n')
	if len(line) > MaxLine {
		return nil, h, fmt.Errorf("audit entry %s is %d bytes long, the maximum is %d", e.Action, len(line), MaxLine)
	}
	return line, next, nil
}

func hashOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// Parse parses a line, without its newline, and checks its hash.
func Parse(line []byte) (Entry, error) {
	if len(line) >= MaxLine {
		return Entry{}, fmt.Errorf("longer than %d bytes", MaxLine)
	}
	hashed := line[:max(0, len(line)-tailLength)]
	// Compare the bytes, so that only one spelling of a line is valid.
	if want := beforeHash + hashOf(hashed) + afterHash; string(line[len(hashed):]) != want {
		return Entry{}, errors.New("changed: the hash does not match the line")
	}
	var e Entry
	if err := json.Unmarshal(line, &e); err != nil {
		return Entry{}, fmt.Errorf("not an audit entry: %w", err)
	}
	return e, nil
}

// Follow checks that e, which must come from Parse, is the entry that follows h, and returns the head of the log
// with e as its last entry.
func (h Head) Follow(e Entry) (Head, error) {
	switch {
	case e.Seq != h.Seq+1:
		return h, fmt.Errorf("entry %d is in the place of entry %d", e.Seq, h.Seq+1)
	case e.Prev != h.Hash:
		return h, fmt.Errorf("entry %d does not match the previous entry, which was changed and rehashed", e.Seq)
	}
	return Head{Seq: e.Seq, Hash: e.Hash}, nil
}

// ChainError reports the first line of a log that is not as the server wrote it.
type ChainError struct {
	// Line is the line number, from 1.
	Line uint64
	// Problem describes what is wrong with the line.
	Problem string
}

func (e *ChainError) Error() string { return fmt.Sprintf("audit log, line %d: %s", e.Line, e.Problem) }

// Before returns the head that the first line of a segment follows, and sets r back to its beginning. It is the zero Head
// for the first segment of a log. If the first line is not valid, Before returns the zero Head, and Verify reports why.
func Before(r io.ReadSeeker) (Head, error) {
	line, err := bufio.NewReaderSize(r, MaxLine).ReadSlice('\n')
	if err != nil && err != io.EOF && err != bufio.ErrBufferFull {
		return Head{}, fmt.Errorf("read audit log: %w", err)
	}
	if _, err := r.Seek(0, io.SeekStart); err != nil {
		return Head{}, fmt.Errorf("read audit log: %w", err)
	}
	e, err := Parse(bytes.TrimSuffix(line, []byte("\n")))
	if err != nil || e.Seq == 0 {
		return Head{}, nil
	}
	return Head{Seq: e.Seq - 1, Hash: e.Prev}, nil
}

// Verify reads a log from the beginning to the end. It returns the head of the valid part. If a line is invalid, the
// error is a *ChainError for the first such line. If r fails, the error wraps r's error.
func Verify(r io.Reader) (Head, error) { return Head{}.Verify(r) }

// Verify is like the function Verify, but reads a segment that follows h.
func (h Head) Verify(r io.Reader) (Head, error) {
	lines := bufio.NewReaderSize(r, MaxLine)
	for number := uint64(1); ; number++ {
		line, err := lines.ReadSlice('\n')
		broken := func(problem string) (Head, error) { return h, &ChainError{Line: number, Problem: problem} }
		switch {
		case err == io.EOF && len(line) == 0:
			return h, nil
		case err == io.EOF:
			return broken("cut off in the middle")
		case err == bufio.ErrBufferFull:
			return broken(fmt.Sprintf("longer than %d bytes", MaxLine))
		case err != nil:
			return h, fmt.Errorf("read audit log, line %d: %w", number, err)
		}
		e, err := Parse(bytes.TrimSuffix(line, []byte("\n")))
		if err != nil {
			return broken(err.Error())
		}
		if h, err = h.Follow(e); err != nil {
			return broken(err.Error())
		}
	}
}
