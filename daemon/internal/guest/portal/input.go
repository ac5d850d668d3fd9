package portal

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// input is the write end of the standard input of a program: a pipe, or the master of its terminal. A nil input is that of
// a program which has none.
type input struct {
	file     *os.File
	terminal bool
	// queue is held while a message is written. So messages are written in order and do not mix.
	queue queue
	// closed says that the input was closed on request. Only the holder of queue uses it.
	closed bool
	// ended says that the program has ended.
	ended atomic.Bool
}

// newPipeInput returns an input that is a pipe, and its read end.
func newPipeInput() (*input, *os.File, error) {
	var pair [2]int
	if err := unix.Pipe2(pair[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	// Only the write end is non-blocking, because programs expect a blocking stdin.
	if err := unix.SetNonblock(pair[1], true); err != nil {
		unix.Close(pair[0])
		unix.Close(pair[1])
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return newInput(os.NewFile(uintptr(pair[1]), "stdin"), false), os.NewFile(uintptr(pair[0]), "stdin"), nil
}

func newInput(file *os.File, terminal bool) *input {
	return &input{file: file, terminal: terminal, queue: make(queue, 1)}
}

var (
	errNoInput     = status.Error(codes.FailedPrecondition, "the process has no input: start it with stdin open")
	errInputClosed = status.Error(codes.FailedPrecondition, "the input of the process was closed")
)

// write writes a message, and then closes the input if end is set. It returns when the pipe or terminal has accepted
// everything. Errors are gRPC statuses.
func (in *input) write(ctx context.Context, data []byte, end bool) error {
	if in == nil {
		return errNoInput
	}
	if err := in.queue.acquire(ctx); err != nil {
		return status.FromContextError(err).Err()
	}
	return in.writeNext(ctx, data, end)
}

// writeNext is like write, but the caller has acquired the queue, which writeNext releases.
func (in *input) writeNext(ctx context.Context, data []byte, end bool) error {
	defer in.queue.release()
	if in.closed {
		return errInputClosed
	}
	if end && in.terminal {
		return status.Error(codes.FailedPrecondition, "a terminal cannot be closed: send the character Ctrl-D (4) to end its input")
	}
	err := writeUntil(ctx, in.file, data)
	switch {
	case err != nil && in.ended.Load():
		return status.Error(codes.FailedPrecondition, "the process has ended")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return status.FromContextError(ctx.Err()).Err()
	case errors.Is(err, syscall.EPIPE):
		return status.Error(codes.FailedPrecondition, "the process has closed its input")
	case err != nil:
		return status.Errorf(codes.FailedPrecondition, "the input of the process cannot be written: %v", err)
	}
	if end {
		in.closed = true
		in.file.Close()
	}
	return nil
}

// writeUntil writes data to a file that does not block. When ctx ends, the write fails with os.ErrDeadlineExceeded, and a
// part of data may have been written.
func writeUntil(ctx context.Context, file *os.File, data []byte) error {
	_ = file.SetWriteDeadline(time.Time{})
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = file.SetWriteDeadline(time.Unix(1, 0))
	})
	_, err := file.Write(data)
	if !stop() {
		<-interrupted // it must not interrupt the next write
	}
	return err
}

// end ends the input of a program that has ended, and the writes that are in progress.
func (in *input) end() {
	if in != nil {
		in.ended.Store(true)
		in.file.Close()
	}
}
