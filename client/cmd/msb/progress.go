package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/urfave/cli/v2"
)

// progress is a writer that counts bytes and shows their number on a terminal.
type progress struct {
	mu          sync.Mutex
	w           io.Writer // nil if it is not a terminal
	label       string    // what the bytes are; may be empty
	done, total int64     // in bytes; total is 0 if it is unknown
	printed     time.Time // when the number was last shown
}

func newProgress(w io.Writer, total int64) *progress {
	if !isTerminal(w) {
		w = nil
	}
	return &progress{w: w, total: total}
}

// Write counts the bytes in b.
func (p *progress) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.update(p.done + int64(len(b)))
	return len(b), nil
}

// set sets the number of bytes.
func (p *progress) set(done int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.update(done)
}

// step sets what is counted, and the numbers of bytes. total is 0 if it is unknown.
func (p *progress) step(label string, done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.label != label {
		p.label, p.printed = label, time.Time{} // show it immediately
	}
	p.total = total
	p.update(done)
}

// update sets the number of bytes and updates the terminal every 100 ms.
func (p *progress) update(done int64) {
	p.done = done
	if p.w != nil && time.Since(p.printed) > 100*time.Millisecond {
		p.printed = time.Now()
		p.print()
	}
}

func (p *progress) print() {
	var text string
	switch {
	case p.total > 0:
		text = fmt.Sprintf("%s of %s (%d%%)", size(p.done), size(p.total), 100*p.done/p.total)
	case p.done > 0:
		text = size(p.done)
	default:
		text = "…"
	}
	fmt.Fprintf(p.w, "\r%s\x1b[K", strings.TrimLeft(p.label+" "+text, " "))
}

// end shows the final number. What is counted after it is not shown.
func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.w != nil && (p.done > 0 || !p.printed.IsZero()) {
		p.print()
		fmt.Fprintln(p.w)
	}
	p.w = nil
}

// announce shows a line on the terminal until clear is called. If standard error is not a terminal, it shows nothing.
func announce(c *cli.Context, text string) (clear func()) {
	if !isTerminal(c.App.ErrWriter) {
		return func() {}
	}
	fmt.Fprint(c.App.ErrWriter, printable(text))
	return func() { fmt.Fprint(c.App.ErrWriter, "\r\x1b[K") }
}
