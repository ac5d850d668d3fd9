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
	// streamChunk is how many bytes are read from a stream at once. A response with them fits into one write to the
	// virtio-serial port, which takes 32 KiB.
	streamChunk = 32<<10 - 64
	// exitGrace is how long a stream stays open after its process has exited. A child in the background may keep the
	// stream open forever, but the shim reports the exit only after the streams have ended.
	exitGrace = 100 * time.Millisecond
	// pipeCapacity is how many bytes a pipe or pty can hold. A process that exits can leave at most this many bytes in
	// it.
	pipeCapacity = 64 << 10
)

// output is a stream that a process writes to and the host reads from.
type output struct {
	file      *os.File
	chunks    chan []byte
	abandoned chan struct{} // closed by abandon
	// rest holds the bytes that the last reader left. It is also the readers' lock. A receive acquires the lock, and a
	// send releases it.
	rest chan []byte
}

// newOutput returns an output that reads f and starts its pump.
func newOutput(f *os.File) *output {
	o := &output{file: f, chunks: make(chan []byte), abandoned: make(chan struct{}), rest: make(chan []byte, 1)}
	o.rest <- nil
	go o.pump()
	return o
}

// pump moves bytes from the file to the readers. It returns at the end of the file, or soon after endAfterExit is
// called.
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

// drain delivers the bytes that a process that has exited left in its pipe. It does not wait for more.
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

// deliver passes a copy of p to a reader. It returns false if the output has been abandoned.
func (o *output) deliver(p []byte) bool {
	if len(p) == 0 {
		return true
	}
	select {
	case o.chunks <- bytes.Clone(p):
		return true
	case <-o.abandoned:
		return false
	}
}

// read waits for output and returns at most limit bytes of it. It returns io.EOF at the end of the output.
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
				return nil, ctx.Err() // the caller has given up, so leave the chunk to the next reader
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

// endAfterExit ends the stream after exitGrace. Call it when the process has exited.
func (o *output) endAfterExit() { _ = o.file.SetReadDeadline(time.Now().Add(exitGrace)) }

// abandon closes the stream and drops unread output. Call it only once.
func (o *output) abandon() {
	close(o.abandoned)
	_ = o.file.SetReadDeadline(time.Unix(1, 0))
}

// input is a stream that the host writes to and a process reads from.
type input struct {
	file *os.File
	// terminal is true if the file is a terminal, which also carries the output.
	terminal bool
	// writing is the writers' lock. A deadline applies to the file, so without the lock, the deadline of one writer
	// would also end the writes of the others.
	writing chan struct{}
}

func newInput(f *os.File, terminal bool) *input {
	return &input{file: f, terminal: terminal, writing: make(chan struct{}, 1)}
}

// write writes p. It waits until the process has read p, the pipe has room for it, or ctx is done.
func (in *input) write(ctx context.Context, p []byte) (int, error) {
	select {
	case in.writing <- struct{}{}:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	defer func() { <-in.writing }()
	deadlineSet := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = in.file.SetWriteDeadline(time.Unix(1, 0))
		close(deadlineSet)
	})
	defer func() {
		if !stop() {
			<-deadlineSet
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

// close closes the process's input. It does nothing for a terminal.
func (in *input) close() {
	if !in.terminal {
		in.file.Close()
	}
}
