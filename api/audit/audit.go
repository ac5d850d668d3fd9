// Package audit is the format of msbd's audit log: one JSON object a line, each with a number and the
// hash of the line before, so that nothing can be changed, taken out or put in between unnoticed. The
// server writes it; anyone can check a copy of it without the server.
//
// The hash of a line can be recomputed with the tools of any host. For the third one:
//
//	sed -n 3p audit.jsonl | sed 's/,"hash":"[0-9a-f]*"}$//' | tr -d '\n' | sha256sum
//
// A log whose end was cut off, or that was rewritten as a whole, is consistent in itself: only the
// Head that the server remembers tells.
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

// Event is something that happened, before it has its place in the log. It holds no secret.
type Event struct {
	// Action is what was done: "key.create".
	Action string `json:"action"`
	// Actor is who did it: "uid:1000", or "server".
	Actor string `json:"actor"`
	// Target is what it was done to, such as the id of a key; may be empty.
	Target string `json:"target,omitempty"`
	// Detail is what else matters of it.
	Detail map[string]string `json:"detail,omitempty"`
}

// The actions.
const (
	KeyCreate     = "key.create"
	KeyRevoke     = "key.revoke"
	KeyRotate     = "key.rotate"
	KeyPrune      = "key.prune"
	KeySuspect    = "key.suspect" // well signed, but not what its record says: the signing key may be stolen
	SigningReset  = "signing_key.reset"
	KeysInvalid   = "keys.invalidate" // keys of an earlier signing key are marked as refused
	ServerStart   = "server.start"
	ServerStop    = "server.stop"
	ServerBackup  = "server.backup"
	ServerRestore = "server.restore"
	StoreRollback = "store.rollback" // the store was put back behind the log: what was changed since is undone
	SandboxStop   = "sandbox.stop"   // by an administrator
	ImageImport   = "image.import"
)

// ActorServer is the Actor of what the server does by itself.
const ActorServer = "server"

// ActorUID is the Actor for a local user.
func ActorUID(uid uint32) string { return fmt.Sprintf("uid:%d", uid) }

// Entry is a line of the log.
type Entry struct {
	// Seq counts from 1 without gaps.
	Seq uint64 `json:"seq"`
	// Time is in UTC, in whole milliseconds.
	Time time.Time `json:"time"`
	Event
	// Prev is the Hash of the entry before; of the first, it is empty.
	Prev string `json:"prev"`
	// Hash is the SHA-256, in hex, of the line up to and without `,"hash":`.
	Hash string `json:"hash,omitempty"`
}

// Head is the end of a log. The zero Head is that of an empty one.
type Head struct {
	Seq  uint64 `json:"seq"`
	Hash string `json:"hash"`
}

// MaxLine is how long a line may be, with its newline, in bytes.
const MaxLine = 64 << 10

// What follows the hashed part of a line.
const (
	beforeHash = `,"hash":"`
	afterHash  = `"}`
	tailLength = len(beforeHash) + 2*sha256.Size + len(afterHash)
)

// Append makes the line that follows h, with its newline, and the head of the log that ends with it. The
// same input makes the same bytes. It fails only if the line would be longer than MaxLine.
func (h Head) Append(at time.Time, e Event) (line []byte, next Head, err error) {
	entry := Entry{Seq: h.Seq + 1, Time: at.UTC().Truncate(time.Millisecond), Event: e, Prev: h.Hash}
	// Text that is not UTF-8, such as the name of a file, must not keep an event out of the log.
	line, err = json.Marshal(entry, json.Deterministic(true), jsontext.AllowInvalidUTF8(true))
	if err != nil {
		return nil, h, fmt.Errorf("encode audit entry %s: %w", e.Action, err)
	}
	line = line[:len(line)-len("}")]
	next = Head{Seq: entry.Seq, Hash: hashOf(line)}
	line = append(append(append(append(line, beforeHash...), next.Hash...), afterHash...), '\n')
	if len(line) > MaxLine {
		return nil, h, fmt.Errorf("audit entry %s has %d bytes, the most is %d", e.Action, len(line), MaxLine)
	}
	return line, next, nil
}

func hashOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// Parse reads a line, without its newline, and checks that its hash is its own.
func Parse(line []byte) (Entry, error) {
	if len(line) >= MaxLine {
		return Entry{}, fmt.Errorf("longer than %d bytes", MaxLine)
	}
	hashed := line[:max(0, len(line)-tailLength)]
	// Compared as bytes, so that a line has one spelling only.
	if want := beforeHash + hashOf(hashed) + afterHash; string(line[len(hashed):]) != want {
		return Entry{}, errors.New("changed: the hash is not that of the line")
	}
	var e Entry
	if err := json.Unmarshal(line, &e); err != nil {
		return Entry{}, fmt.Errorf("not an entry: %w", err)
	}
	return e, nil
}

// Follow checks that e, which Parse returned, is the entry that follows h, and returns the head with it.
func (h Head) Follow(e Entry) (Head, error) {
	switch {
	case e.Seq != h.Seq+1:
		return h, fmt.Errorf("entry %d stands where entry %d belongs", e.Seq, h.Seq+1)
	case e.Prev != h.Hash:
		return h, fmt.Errorf("entry %d does not follow the one before: that one was changed and hashed anew", e.Seq)
	}
	return Head{Seq: e.Seq, Hash: e.Hash}, nil
}

// ChainError says where a log is not as it was written.
type ChainError struct {
	// Line counts from 1.
	Line uint64
	// Problem is what is wrong with it, in words.
	Problem string
}

func (e *ChainError) Error() string { return fmt.Sprintf("audit log, line %d: %s", e.Line, e.Problem) }

// Verify reads a log from its beginning to its end and returns the head of what is good. The error is a
// *ChainError at the first line that is not, or what r returned.
func Verify(r io.Reader) (Head, error) {
	var h Head
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
