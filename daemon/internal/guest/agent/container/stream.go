package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// streamChunk is how much is read of a stream at once; the shim asks for as much.
	streamChunk = 32 << 10
	// exitGrace is how long a stream stays open after its process ended. A child that was left
	// behind may hold it forever, and the shim reports an exit only at the end of the streams.
	exitGrace = 100 * time.Millisecond
	// pipeCapacity is what a pipe or pty can hold: the most that a process may have left in it.
	pipeCapacity = 64 << 10
)

// output is a stream that a process writes and the host reads.
type output struct {
	file   *os.File
	chunks chan []byte
	gone   chan struct{} // closed when nobody will read any more
	// rest holds what the last reader left, and is the readers' lock.
	rest chan []byte
}

func newOutput(f *os.File) *output {
	o := &output{file: f, chunks: make(chan []byte), gone: make(chan struct{}), rest: make(chan []byte, 1)}
	o.rest <- nil
	go o.pump()
	return o
}

// pump moves bytes from the file to its readers. It ends with the file, or soon after expire.
func (o *output) pump() {
	defer close(o.chunks)
	defer o.file.Close()
	buf := make([]byte, streamChunk)
	for {
		n, err := o.file.Read(buf)
		if !o.deliver(buf[:n]) {
			return
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			o.drain(buf)
			return
		}
		if err != nil {
			return
		}
	}
}

// drain delivers what an ended process left in its pipe, without waiting for more.
func (o *output) drain(buf []byte) {
	raw, err := o.file.SyscallConn()
	if err != nil {
		return
	}
	for budget := pipeCapacity; budget > 0; {
		n := 0
		err := raw.Control(func(fd uintptr) { n, _ = unix.Read(int(fd), buf) })
		if err != nil || n <= 0 || !o.deliver(buf[:n]) {
			return
		}
		budget -= n
	}
}

func (o *output) deliver(p []byte) bool {
	if len(p) == 0 {
		return true
	}
	select {
	case o.chunks <- bytes.Clone(p):
		return true
	case <-o.gone:
		return false
	}
}

// read waits for output and returns at most limit bytes of it; io.EOF at the end.
func (o *output) read(ctx context.Context, limit int) ([]byte, error) {
	var rest []byte
	select {
	case rest = <-o.rest:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { o.rest <- rest }()
	if len(rest) == 0 {
		var ok bool
		select {
		case rest, ok = <-o.chunks:
			if !ok {
				return nil, io.EOF
			}
			if ctx.Err() != nil {
				return nil, ctx.Err() // both were ready: the next reader takes it
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	n := min(limit, len(rest))
	var p []byte
	p, rest = rest[:n], rest[n:]
	return p, nil
}

// expire ends the stream soon: its process is gone.
func (o *output) expire() { _ = o.file.SetReadDeadline(time.Now().Add(exitGrace)) }

// abandon drops what was not read. It is called once.
func (o *output) abandon() {
	close(o.gone)
	_ = o.file.SetReadDeadline(time.Unix(1, 0))
}

// input is a stream that the host writes and a process reads.
type input struct {
	file *os.File
	// terminal is whether the file carries the output as well.
	terminal bool
	// turn is the writers' lock: a deadline is the file's, and must end one write only.
	turn chan struct{}
}

func newInput(f *os.File, terminal bool) *input {
	return &input{file: f, terminal: terminal, turn: make(chan struct{}, 1)}
}

// write waits until the process took all of p, its pipe has room for it, or ctx ends.
func (in *input) write(ctx context.Context, p []byte) (int, error) {
	select {
	case in.turn <- struct{}{}:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	defer func() { <-in.turn }()
	cut := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = in.file.SetWriteDeadline(time.Unix(1, 0))
		close(cut)
	})
	defer func() {
		if !stop() {
			<-cut
			_ = in.file.SetWriteDeadline(time.Time{})
		}
	}()
	n, err := in.file.Write(p)
	switch {
	case err == nil:
		return n, nil
	case ctx.Err() != nil:
		return n, ctx.Err()
	default:
		return n, fmt.Errorf("write to stdin: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
}

// close ends the process's input. A terminal has no end of its own.
func (in *input) close() {
	if !in.terminal {
		in.file.Close()
	}
}
