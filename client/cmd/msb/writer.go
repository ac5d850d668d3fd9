package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

// escaper escapes what could control a terminal or reorder its text, because the output of a sandbox is not trusted. Line feeds,
// tabs and carriage returns stay, because programs show their progress with them.
type escaper struct {
	w    io.Writer
	rest []byte // the beginning of a character
}

// forTerminal returns w, or an escaper if w is a terminal.
func forTerminal(w io.Writer) io.Writer {
	if !isTerminal(w) {
		return w
	}
	return &escaper{w: w}
}

// Write implements io.Writer.
func (e *escaper) Write(p []byte) (int, error) {
	text := append(e.rest, p...)
	var out strings.Builder
	for len(text) > 0 && utf8.FullRune(text) {
		r, n := utf8.DecodeRune(text)
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&out, `\x%02x`, text[0])
		case r == '\n', r == '\t', r == '\r', !unicode.In(r, unicode.Cc, unicode.Cf):
			out.Write(text[:n])
		default:
			out.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
		}
		text = text[n:]
	}
	e.rest = append([]byte(nil), text...)
	if _, err := io.WriteString(e.w, out.String()); err != nil {
		return 0, err
	}
	return len(p), nil
}

// flush writes what w holds of a character that is not complete.
func flush(w io.Writer) error {
	e, ok := w.(*escaper)
	if !ok {
		return nil
	}
	for _, b := range e.rest {
		if _, err := fmt.Fprintf(e.w, `\x%02x`, b); err != nil {
			return err
		}
	}
	e.rest = nil
	return nil
}

const (
	// maxQueued is how much output may wait for its reader, in bytes. If more waits, the program in the sandbox waits as well,
	// and after a minute the server closes the connection.
	maxQueued = 64 << 20
	// drainTime is how long an interrupted msb waits for the reader of its output.
	drainTime = time.Second
)

// queue passes on what is written to it in a goroutine and in the same order, so that a reader that pauses, such as less, does not
// stop the connection.
type queue struct {
	mu     sync.Mutex
	change sync.Cond
	pieces []piece
	size   int // of pieces, in bytes
	closed bool
	err    error
	ended  chan struct{}
}

// piece is output that waits.
type piece struct {
	to   io.Writer
	data []byte
}

func newQueue() *queue {
	q := &queue{ended: make(chan struct{})}
	q.change.L = &q.mu
	go q.passOn()
	return q
}

// to returns a writer whose output the queue passes on to w. It returns the error of an earlier write.
func (q *queue) to(w io.Writer) io.Writer { return queued{q, w} }

type queued struct {
	queue *queue
	w     io.Writer
}

func (w queued) Write(p []byte) (int, error) { return w.queue.add(w.w, p) }

func (q *queue) add(to io.Writer, p []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.size > maxQueued && q.err == nil {
		q.change.Wait()
	}
	if q.err != nil {
		return 0, q.err
	}
	if last := len(q.pieces) - 1; last >= 0 && q.pieces[last].to == to {
		q.pieces[last].data = append(q.pieces[last].data, p...)
	} else {
		q.pieces = append(q.pieces, piece{to, append([]byte(nil), p...)})
	}
	q.size += len(p)
	q.change.Broadcast()
	return len(p), nil
}

// abandon discards what waits. Writes return err.
func (q *queue) abandon(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err == nil {
		q.err = err
	}
	q.pieces, q.size = nil, 0
	q.change.Broadcast()
}

func (q *queue) passOn() {
	defer close(q.ended)
	writers := map[io.Writer]bool{}
	for {
		q.mu.Lock()
		for len(q.pieces) == 0 && !q.closed && q.err == nil {
			q.change.Wait()
		}
		pieces := q.pieces
		q.pieces, q.size = nil, 0
		q.change.Broadcast()
		done := len(pieces) == 0
		q.mu.Unlock()
		for _, p := range pieces {
			writers[p.to] = true
			if _, err := p.to.Write(p.data); err != nil {
				q.abandon(err)
				return
			}
		}
		if !done {
			continue
		}
		for w := range writers {
			if err := flush(w); err != nil {
				q.abandon(err)
			}
		}
		return
	}
}

// finish waits until everything was written, and returns the error of a write. If ctx is done, it does not wait long.
func (q *queue) finish(ctx context.Context) error {
	q.mu.Lock()
	q.closed = true
	q.change.Broadcast()
	q.mu.Unlock()
	select {
	case <-q.ended:
	case <-ctx.Done():
		select {
		case <-q.ended:
		case <-time.After(drainTime):
			q.abandon(ctx.Err())
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.err
}

// interruptible returns a reader of r that ends with the error of ctx when ctx is done. The goroutine that reads r may outlive it.
func interruptible(ctx context.Context, r io.Reader) io.Reader {
	out, in := io.Pipe()
	go func() {
		_, err := io.Copy(in, r)
		in.CloseWithError(err)
	}()
	context.AfterFunc(ctx, func() { in.CloseWithError(ctx.Err()) })
	return out
}
