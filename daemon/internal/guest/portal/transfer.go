package portal

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// transferID is the length of the id of a transfer, in bytes.
	transferID = 32
	// minTransfer is the least number of bytes for which a transfer is offered. For fewer, its start takes longer than it saves.
	minTransfer = 4 << 20
	// transferPatience is how long an offered transfer may take to begin.
	transferPatience = 3 * time.Second
)

// transfers are the offered transfers that have not begun. They move the bytes of large files over a connection of their own,
// in the kernel where it supports that. Messages need several times as long, because each is encoded, copied and confirmed.
type transfers struct {
	mu      sync.Mutex
	offered map[string]chan incoming // by id
}

func newTransfers() *transfers { return &transfers{offered: make(map[string]chan incoming)} }

// begin gives a connection to the transfer that it is for. If that is not offered, begin closes the connection.
func (t *transfers) begin(conn incoming) {
	t.mu.Lock()
	defer t.mu.Unlock()
	begun, ok := t.offered[conn.transferID()]
	if !ok {
		conn.Close()
		return
	}
	delete(t.offered, conn.transferID())
	begun <- conn
}

// wait calls offer and then waits until the transfer id begins. It returns nil if the transfer does not begin in time.
func (t *transfers) wait(ctx context.Context, id string, offer func() error) (incoming, error) {
	begun := make(chan incoming, 1)
	t.mu.Lock()
	_, known := t.offered[id]
	if !known && len(id) == transferID {
		t.offered[id] = begun
	}
	t.mu.Unlock()
	if known || len(id) != transferID {
		return nil, status.Error(codes.InvalidArgument, "the id of the transfer is not 32 hexadecimal digits, or it is in use")
	}
	err := offer()
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, transferPatience)
		defer cancel()
		select {
		case conn := <-begun:
			return conn, nil
		case <-ctx.Done():
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.offered[id]; ok {
		delete(t.offered, id)
		return nil, err
	}
	return <-begun, err
}

// send offers a transfer with offer, and then sends length bytes of f, from offset on. It returns when the receiver has ended the
// transfer or ctx is done. sent reports whether the transfer has begun.
func (t *transfers) send(ctx context.Context, id string, offer func() error, f *os.File, offset, length int64) (sent bool, err error) {
	conn, err := t.wait(ctx, id, offer)
	if conn == nil {
		return false, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err == nil {
		err = conn.move(f, offset, length)
	}
	if err == nil {
		_, _ = io.Copy(io.Discard, conn) // until the receiver has everything: with a bridge, it would lose what is in the pipe
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return true, err
}

// receive offers a transfer with offer, and returns the connection over which the bytes come, which ends with ctx. The caller
// must close it. It is nil if the transfer has not begun.
func (t *transfers) receive(ctx context.Context, id string, offer func() error) (incoming, error) {
	conn, err := t.wait(ctx, id, offer)
	if conn == nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() { conn.Close() })
	if err != nil {
		conn.Close()
		return nil, err
	}
	if _, err := conn.Write([]byte{0}); err != nil { // without it, the sender does not know that its bytes are read
		conn.Close()
		return nil, nil
	}
	return conn, nil
}

// errTransferEnded is returned if the connection has ended before everything was sent, for example because its bridge was killed.
var errTransferEnded = status.Error(codes.Aborted, "the transfer of the file was ended in the sandbox")

// maxPause limits how long move pauses.
const maxPause = 50 * time.Millisecond

// move moves length bytes of f, from offset on, into the pipe. Whenever the pipe is full, move pauses until the receiver has emptied about half of it. The kernel would wake it after each
// read of the receiver, and each change between the two takes long on an emulated processor.
func (p *pipes) move(f *os.File, offset, length int64) error {
	size := int64(pipeSize)
	if n, err := unix.FcntlInt(p.out.Fd(), unix.F_GETPIPE_SZ, 0); err == nil {
		size = int64(n)
	}
	var pause time.Duration
	full := time.Now() // when the pipe was last filled
	for length > 0 {
		n, waited, err := p.splice(f, &offset, min(length, size), pause)
		switch {
		case err == unix.EINVAL: // the file system or the pipe has no splice
			n, err := io.Copy(struct{ io.Writer }{p.out}, io.NewSectionReader(f, offset, length))
			switch {
			case errors.Is(err, os.ErrClosed), errors.Is(err, unix.EPIPE):
				return errTransferEnded
			case err == nil && n < length:
				return io.ErrUnexpectedEOF
			}
			return err
		case err != nil:
			return err
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		length -= n
		if waited {
			pause = min(maxPause, time.Since(full)*time.Duration(size)/2/time.Duration(n))
		}
		full = time.Now()
	}
	return nil
}

// splice moves up to length bytes of f, from offset on, into the pipe, and advances offset. If the pipe is full, it waits until
// there is room, and then for the time pause.
func (p *pipes) splice(f *os.File, offset *int64, length int64, pause time.Duration) (n int64, waited bool, err error) {
	raw, err := p.out.SyscallConn()
	if err != nil {
		return 0, false, err
	}
	var spliceErr error
	err = raw.Write(func(pipe uintptr) bool {
		if waited {
			time.Sleep(pause)
		}
		for {
			n, spliceErr = unix.Splice(int(f.Fd()), offset, int(pipe), nil, int(length), unix.SPLICE_F_NONBLOCK)
			if spliceErr != unix.EINTR {
				break
			}
		}
		waited = waited || spliceErr == unix.EAGAIN
		return spliceErr != unix.EAGAIN
	})
	if err != nil || spliceErr == unix.EPIPE {
		return 0, false, errTransferEnded
	}
	return n, waited, spliceErr
}
