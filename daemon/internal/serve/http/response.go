package http

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
)

// response is the http.ResponseWriter of an endpoint. It buffers what is written until the endpoint returns or flushes.
type response struct {
	http.ResponseWriter
	call       *Call
	ctx        context.Context // the request's context, which ends when the key is revoked or expires
	status     int             // 0 until it is known
	buffer     chunks
	sent       bool     // whether at least the status and the headers were sent
	err        error    // the error of a write that exceeded the limit of held bytes
	clientGone bool     // whether a write failed, because the client disconnected or did not read in time
	hijacked   net.Conn // nil unless the endpoint hijacked the connection
}

// All responses share these header values, which must not be modified.
var (
	headerJSON    = []string{"application/json"}
	headerNoSniff = []string{"nosniff"}
	headerNoStore = []string{"no-store"}
	headerClose   = []string{"close"}
	// headerUnbuffered is the value of X-Accel-Buffering that makes nginx, and proxies that follow it, pass on each part
	// of a response as it comes.
	headerUnbuffered = []string{"no"}
)

// WriteHeader implements http.ResponseWriter. Only the first call has an effect.
func (w *response) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
}

// Write implements http.ResponseWriter. If the response would exceed the limit of held bytes, the error is an
// *rpc.Error.
func (w *response) Write(p []byte) (n int, err error) {
	w.WriteHeader(http.StatusOK)
	if !w.sent {
		if err := w.hold(len(p)); err != nil {
			return 0, err
		}
		return w.buffer.Write(p)
	}
	w.write(func() { n, err = w.ResponseWriter.Write(p) })
	w.clientGone = w.clientGone || err != nil
	return n, err
}

// WriteString is like Write but does not copy s to a []byte while the response is buffered.
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

// hold counts n more buffered bytes. After an error it fails for every n, so that no response is sent with a gap.
func (w *response) hold(n int) error {
	if w.err == nil {
		w.err = w.call.holdResponse(w.buffer.size + n)
	}
	return w.err
}

// FlushError sends what was written so far. From then on, each write is sent at once, and proxies are asked to do the
// same. After a write that exceeded the limit of held bytes, it sends nothing, so that finish can send that error.
// http.ResponseController calls it.
func (w *response) FlushError() (err error) {
	if w.hijacked != nil {
		return http.ErrHijacked
	}
	if w.err != nil {
		return w.err
	}
	if !w.sent {
		w.Header()["X-Accel-Buffering"] = headerUnbuffered
	}
	if err := w.send(); err != nil {
		return err
	}
	w.write(func() { err = http.NewResponseController(w.ResponseWriter).Flush() })
	return err
}

// lastWrite is how long the client may take to accept what an endpoint writes after the context of the request has ended,
// such as the reason.
const lastWrite = time.Second

// write calls f, which writes to the client. It fails at the deadline, and when the context of the request ends, because a
// client that does not read must not keep its request from ending with the key.
func (w *response) write(f func()) {
	if w.ctx.Err() != nil {
		w.setDeadline(time.Now().Add(min(lastWrite, w.call.deadline())))
	} else {
		w.setDeadline(time.Now().Add(w.call.deadline()))
		ended := make(chan struct{})
		stop := context.AfterFunc(w.ctx, func() {
			w.setDeadline(time.Now())
			close(ended)
		})
		defer func() {
			if !stop() {
				<-ended // so that it does not affect the next write
			}
		}()
	}
	w.call.turn.write(f)
}

// Flush implements http.Flusher.
func (w *response) Flush() { _ = w.FlushError() }

// hijackGrace is the time between the end of a request's context and the close of its hijacked connection.
const hijackGrace = 500 * time.Millisecond

// Hijack implements http.Hijacker. If the endpoint has written the status 101, Hijack first sends that and the headers. The
// connection is closed when the endpoint returns, or hijackGrace after the request's context has ended, whichever is first.
// For a connection that cannot be hijacked, such as one with HTTP/2, the error is errdefs.ErrInvalidArgument.
func (w *response) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if w.sent || w.buffer.size > 0 {
		return nil, nil, errors.New("hijack the connection: the response has already begun")
	}
	hijacker, ok := w.ResponseWriter.(http.Hijacker)
	if !ok {
		return nil, nil, errOnlyHTTP1
	}
	if w.status == http.StatusSwitchingProtocols {
		w.setHeaders()
		w.ResponseWriter.WriteHeader(w.status)
		w.sent = true
	}
	conn, rw, err := hijacker.Hijack()
	if err != nil {
		return nil, nil, err
	}
	w.call.turn.pause() // the endpoint reads and writes the connection itself, so nobody knows when it waits
	w.sent, w.status = true, http.StatusSwitchingProtocols
	w.hijacked = w.call.gateway.connections.trackHijacked(conn)
	context.AfterFunc(w.ctx, func() { time.AfterFunc(hijackGrace, func() { w.hijacked.Close() }) })
	return w.hijacked, rw, nil
}

// setHeaders sets the headers of every response.
func (w *response) setHeaders() {
	h := w.Header()
	h["X-Request-Id"] = []string{w.call.ID}
	h["X-Content-Type-Options"] = headerNoSniff
	h["Cache-Control"] = headerNoStore
	if h["Upgrade"] == nil {
		delete(h, "Connection") // some libraries set it, but only net/http may decide on it
	}
	if w.call.upload.endsConnection() {
		h["Connection"] = headerClose
	}
}

// setDeadline sets the deadline of the next write, and of one in progress.
func (w *response) setDeadline(t time.Time) {
	// The WriteTimeout of http.Server would include the time of the run. The ResponseWriter of a test may not support
	// deadlines.
	_ = http.NewResponseController(w.ResponseWriter).SetWriteDeadline(t)
}

// deadline returns how long the client may take to accept a write.
func (c *Call) deadline() time.Duration {
	if c.endpoint == nil {
		return AnswerDeadline
	}
	return c.endpoint.Deadline
}

// send sends the headers and what was written so far. It does nothing if the headers were already sent.
func (w *response) send() error {
	if w.sent {
		return nil
	}
	w.WriteHeader(http.StatusOK)
	w.sent = true
	w.setHeaders()
	h := w.Header()
	if w.buffer.size > 0 && h["Content-Type"] == nil {
		h["Content-Type"] = headerJSON
	}
	w.setDeadline(time.Now().Add(w.call.deadline()))
	w.ResponseWriter.WriteHeader(w.status)
	err := w.buffer.writeTo(func(p []byte) (n int, err error) {
		w.call.turn.write(func() { n, err = w.ResponseWriter.Write(p) })
		return n, err
	})
	if err == nil { // after a failed write, HTTP/2 may still read from the buffer, so it is not reused
		w.buffer.reset()
	}
	return err
}

// finish sends what the endpoint wrote. If err is not nil, or the response exceeded the limit of held bytes, it sends
// that error instead, unless the response has already begun. It returns the cause of the error for the log.
func (w *response) finish(err error) (cause error) {
	if err == nil {
		err = w.err
	}
	if err != nil {
		r := w.call.refusal(err)
		cause = r.Cause
		if !w.sent {
			w.discard()
			w.status = r.Status
			for name, values := range r.Header {
				w.Header()[name] = values
			}
			rpcerr.SetHeaders(w.Header(), r.Status, r.ClientError)
			rpcerr.WriteResponse(&w.buffer, nil, r.ClientError, r.ID)
		} else {
			w.status = r.Status // for the log and the metrics; the client already has another status
		}
	}
	if w.hijacked != nil {
		_ = w.hijacked.Close()
	} else {
		w.call.turn.resume()
		_ = w.send() // fails if the client disconnected or does not read, which needs no handling
		w.call.turn.pause()
	}
	return cause
}

// discard discards the body and the headers written so far.
func (w *response) discard() {
	w.buffer.reset()
	clear(w.Header())
}

// chunks holds the body of a response in pieces of equal size. Unlike bytes.Buffer, it does not copy what it holds when it
// grows, which would occupy several times the memory that is counted.
type chunks struct {
	all  []*[chunkSize]byte
	size int
}

const chunkSize = 16 << 10

var chunkPool = sync.Pool{New: func() any { return new([chunkSize]byte) }}

func (c *chunks) Write(p []byte) (int, error) { return appendChunks(c, p), nil }

func (c *chunks) WriteString(s string) (int, error) { return appendChunks(c, s), nil }

func appendChunks[T string | []byte](c *chunks, p T) int {
	n := len(p)
	for len(p) > 0 {
		used := c.size % chunkSize
		if used == 0 {
			c.all = append(c.all, chunkPool.Get().(*[chunkSize]byte))
		}
		copied := copy(c.all[len(c.all)-1][used:], p)
		c.size += copied
		p = p[copied:]
	}
	return n
}

func (c *chunks) writeTo(write func([]byte) (int, error)) error {
	left := c.size
	for _, chunk := range c.all {
		n := min(left, chunkSize)
		if _, err := write(chunk[:n]); err != nil {
			return err
		}
		left -= n
	}
	return nil
}

// reset empties c. Its memory is reused.
func (c *chunks) reset() {
	for _, chunk := range c.all {
		chunkPool.Put(chunk)
	}
	c.all, c.size = nil, 0
}

// buffers is a pool of buffers for request bodies.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

func newBuffer() *bytes.Buffer { return buffers.Get().(*bytes.Buffer) }

// maxPooledBuffer is the largest capacity, in bytes, of a buffer that is kept for other requests.
const maxPooledBuffer = 64 << 10

// freeBuffer returns a buffer to the pool unless it is too large.
func freeBuffer(b *bytes.Buffer) {
	if b.Cap() <= maxPooledBuffer {
		b.Reset()
		buffers.Put(b)
	}
}

var _ io.StringWriter = (*response)(nil)
