package portalclient

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

const (
	// maxTransfers is how many transfers a connection may have at a time. Each is a process in the guest, with a full pipe.
	maxTransfers = 2
	// minUpload is the least number of bytes for which a transfer to a sandbox is requested.
	minUpload = 4 << 20
	// attachTimeout limits how long a transfer may take to open. It is longer than the portal waits.
	attachTimeout = 5 * time.Second
)

// newTransfer returns the id of a transfer that the portal may offer, or "" if there are enough calls that may have one. The
// caller must call endTransfer.
func (c *Client) newTransfer() string {
	select {
	case c.transfers <- struct{}{}:
	default:
		return ""
	}
	id := make([]byte, 16)
	rand.Read(id)
	return hex.EncodeToString(id)
}

func (c *Client) endTransfer() { <-c.transfers }

// openUpload waits until the portal offers the transfer id in call, and opens it. It returns nil if that takes too long, or if the
// portal closes the stream instead of confirming that it reads it. The portal then expects the data in messages, or ends the
// call. The stream ends with the context of the call.
func (c *Client) openUpload(call grpc.ClientStream, id string) io.WriteCloser {
	ctx, cancel := context.WithTimeout(call.Context(), attachTimeout)
	defer cancel()
	offered := make(chan struct{})
	go func() {
		defer close(offered)
		_, _ = call.Header()
	}()
	select {
	case <-offered:
	case <-ctx.Done():
	}
	if ctx.Err() != nil { // the header did not come in time, or the call has ended
		return nil
	}
	stream, err := c.attach(ctx, id)
	if err != nil {
		return nil
	}
	context.AfterFunc(call.Context(), func() { stream.Close() })
	if _, err = io.ReadFull(stream, make([]byte, 1)); err != nil {
		stream.Close()
		return nil
	}
	return stream
}

// announced is data of a known length, which the portal knows too. If it has fewer bytes than left, it ends with
// io.ErrUnexpectedEOF, and if it has more, with errTooLong.
type announced struct {
	io.Reader
	left int64
}

func (a *announced) Read(b []byte) (n int, err error) {
	n, err = a.Reader.Read(b)
	a.left -= int64(n)
	switch {
	case a.left < 0:
		return 0, errTooLong
	case err == io.EOF && a.left > 0:
		return n, io.ErrUnexpectedEOF
	}
	return n, err
}

var errTooLong = errors.New("there are more bytes than announced")

// transfer is the data of a file that comes over a stream of its own. If the stream does not open, the data comes in the
// messages of the call. It implements io.ReadCloser.
type transfer struct {
	*receiver                    // the call
	stream    io.ReadWriteCloser // nil if there is none
	closed    context.Context    // ends with the client
	rest      int64              // how many bytes the portal has not sent yet
	begun     bool               // a byte has come over the stream, so that no message has any
	end       func()
}

// openTransfer opens the transfer id of length bytes, which the portal has offered in call. Its Close ends the call and the
// transfer.
func (c *Client) openTransfer(id string, length int64, call *receiver) *transfer {
	t := &transfer{receiver: call, rest: length, end: c.endTransfer}
	ctx, cancel := context.WithTimeout(call.ctx, attachTimeout)
	defer cancel()
	stream, err := c.attach(ctx, id)
	if err != nil {
		return t // the portal does not wait for the stream for long
	}
	t.stream = stream
	t.closed = c.closed
	closeStream := func() { stream.Close() }
	withCall, withClient := context.AfterFunc(call.ctx, closeStream), context.AfterFunc(c.closed, closeStream)
	t.end = func() {
		withCall()
		withClient()
		c.endTransfer()
	}
	return t
}

// Read implements io.Reader.
func (t *transfer) Read(p []byte) (int, error) {
	if t.stream != nil && t.rest > 0 {
		n, err := t.stream.Read(p[:min(int64(len(p)), t.rest)])
		ended := t.ctx.Err() != nil || t.closed.Err() != nil // then the stream may have lost bytes
		t.begun = t.begun || n > 0
		if !ended && (n > 0 || err == nil) {
			t.rest -= int64(n)
			return n, nil
		}
	}
	if cause := context.Cause(t.ctx); cause != nil {
		return 0, cause
	}
	// The portal waits for the end of the stream before it ends the call.
	t.closeStream()
	n, err := t.receiver.Read(p)
	if !t.begun {
		t.rest -= int64(n)
	}
	if t.rest > 0 && (err == io.EOF || t.begun && err == nil) {
		t.err = classified{"the sandbox ended the transfer of the file too early", sandbox.ErrRunFailed}
		t.data = nil
		return 0, t.err
	}
	return n, err
}

func (t *transfer) closeStream() {
	if t.stream != nil {
		t.stream.Close()
		t.stream = nil
	}
}

// Close implements io.Closer. It may not be called at the same time as Read.
func (t *transfer) Close() error {
	t.cancel()
	t.closeStream()
	if t.end != nil {
		t.end()
		t.end = nil
	}
	return nil
}
