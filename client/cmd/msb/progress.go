package main

import (
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/urfave/cli/v2"
)

// progress is a writer that counts bytes and shows their number on a terminal.
type progress struct {
	mu          sync.Mutex
	w           io.Writer // nil if it is not a terminal
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

// update sets the number of bytes and updates the terminal every 100 ms.
func (p *progress) update(done int64) {
	p.done = done
	if p.w != nil && time.Since(p.printed) > 100*time.Millisecond {
		p.printed = time.Now()
		p.print()
	}
}

func (p *progress) print() {
	if p.total > 0 {
		fmt.Fprintf(p.w, "\r%s of %s (%d%%)\x1b[K", size(p.done), size(p.total), 100*p.done/p.total)
	} else {
		fmt.Fprintf(p.w, "\r%s\x1b[K", size(p.done))
	}
}

// end shows the final number. What is counted after it is not shown.
func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.w != nil && p.done > 0 {
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
