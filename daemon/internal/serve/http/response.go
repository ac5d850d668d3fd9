package http

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
)

// response is the http.ResponseWriter of an endpoint. It keeps what is written until the endpoint returns or flushes.
type response struct {
	http.ResponseWriter
	call       *Call
	ctx        context.Context // of the request; it ends with its key
	status     int             // 0 until it is known
	buffer     *bytes.Buffer
	sent       bool  // the status and the headers, at least
	err        error // of a write that had no room
	clientGone bool  // the client has left, or accepts nothing
	hijacked   net.Conn
}

// The headers that responses share are values, which nobody changes.
var (
	headerJSON    = []string{"application/json"}
	headerNoSniff = []string{"nosniff"}
	headerNoStore = []string{"no-store"}
)

// WriteHeader implements http.ResponseWriter. The first status counts.
func (w *response) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
}

// Write implements http.ResponseWriter. Its error is an *rpc.Error if the response would hold too much.
func (w *response) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	if !w.sent {
		if err := w.hold(len(p)); err != nil {
			return 0, err
		}
		return w.buffer.Write(p)
	}
	w.setDeadline()
	n, err := w.ResponseWriter.Write(p)
	w.clientGone = w.clientGone || err != nil
	return n, err
}

// WriteString is Write without a copy.
func (w *response) WriteString(s string) (int, error) {
	if w.sent {
		return w.Write([]byte(s))
	}
	w.WriteHeader(http.StatusOK)
	if err := w.hold(len(s)); err != nil {
		return 0, err
	}
	return w.buffer.WriteString(s)
}

// hold counts n bytes more. After an error there is room for nothing, so that nobody gets a response with a gap.
func (w *response) hold(n int) error {
	if w.err == nil {
		w.err = w.call.holdResponse(w.buffer.Len() + n)
	}
	return w.err
}

// FlushError is what http.ResponseController calls. It sends what was written, and from now on each write is sent at
// once.
func (w *response) FlushError() error {
	if w.hijacked != nil {
		return http.ErrHijacked
	}
	if err := w.send(); err != nil {
		return err
	}
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// Flush implements http.Flusher.
func (w *response) Flush() { _ = w.FlushError() }

// Hijack implements http.Hijacker. The connection closes when the endpoint returns, or when the request's context ends
// before that. Its error is errdefs.ErrInvalidArgument for a connection that cannot be hijacked.
func (w *response) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if w.sent || w.buffer.Len() > 0 {
		return nil, nil, errors.New("hijack the connection: the response has begun")
	}
	conn, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if errors.Is(err, http.ErrNotSupported) {
		return nil, nil, fmt.Errorf("this path needs a connection with HTTP/1.1 alone: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, nil, err
	}
	w.sent, w.status = true, http.StatusSwitchingProtocols
	w.hijacked = w.call.gateway.connections.trackHijacked(conn)
	context.AfterFunc(w.ctx, func() { w.hijacked.Close() })
	return w.hijacked, rw, nil
}

func (w *response) setDeadline() {
	// Not the server's WriteTimeout, which would count the run. Tests' writers need not support it.
	_ = http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(w.call.deadline()))
}

// deadline is how long the client may take to accept a write.
func (c *Call) deadline() time.Duration {
	if c.endpoint == nil {
		return AnswerDeadline
	}
	return c.endpoint.Deadline
}

// send sends the headers and what was written up to now.
func (w *response) send() error {
	if w.sent {
		return nil
	}
	w.WriteHeader(http.StatusOK)
	w.sent = true
	h := w.Header()
	h["X-Request-Id"] = []string{w.call.ID}
	h["X-Content-Type-Options"] = headerNoSniff
	h["Cache-Control"] = headerNoStore
	delete(h, "Connection") // libraries set it; it is net/http's
	if w.buffer.Len() > 0 && h["Content-Type"] == nil {
		h["Content-Type"] = headerJSON
	}
	w.setDeadline()
	w.ResponseWriter.WriteHeader(w.status)
	_, err := w.ResponseWriter.Write(w.buffer.Bytes())
	if err == nil { // HTTP/2 may still read from the buffer after a write that failed
		freeBuffer(w.buffer)
		w.buffer = &bytes.Buffer{}
	}
	return err
}

// finish sends what an endpoint wrote, or in its place the error that it returned. It returns why the request was
// refused.
func (w *response) finish(err error) (refused error) {
	if err == nil {
		err = w.err
	}
	if err != nil {
		r := w.call.refusal(err)
		refused = r.Cause
		if !w.sent {
			w.discard()
			w.status = r.Status
			for name, values := range r.Header {
				w.Header()[name] = values
			}
			rpcerr.SetHeaders(w.Header(), r.Status, r.ClientError)
			rpcerr.WriteResponse(w.buffer, nil, r.ClientError, nil)
		} else if w.hijacked == nil {
			w.status = r.Status // for the log: the client has another
		}
	}
	if w.hijacked != nil {
		_ = w.hijacked.Close()
	} else {
		_ = w.send() // the client has left, or accepts nothing
	}
	return refused
}

// discard forgets what was written.
func (w *response) discard() {
	w.buffer.Reset()
	clear(w.Header())
}

// buffers are for bodies.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

func newBuffer() *bytes.Buffer { return buffers.Get().(*bytes.Buffer) }

// maxPooledBuffer is how large a buffer may be to be kept for other requests.
const maxPooledBuffer = 64 << 10

func freeBuffer(b *bytes.Buffer) {
	if b.Cap() <= maxPooledBuffer {
		b.Reset()
		buffers.Put(b)
	}
}

var _ io.StringWriter = (*response)(nil)
