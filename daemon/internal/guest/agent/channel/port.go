package channel

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// past is a deadline that ends pending reads or writes immediately.
var past = time.Unix(1, 0)

// portListener is a listener on a virtio-serial port. The port is a single byte stream. One client after another uses
// it, so there is one connection at a time. A connection starts with the first byte from a client. It ends when the
// client disconnects. The port stays open between connections, because closing it would drop the bytes that the next
// client has already sent. The port does not report a change of clients if the next one connects immediately, or if the
// guest was restored from a snapshot. Both clients then use the same connection.
type portListener struct {
	file *os.File
	raw  syscall.RawConn
	free chan struct{} // holds a token while there is no connection
	// pending has the bytes of the next client that have already been read. Only the holder of the token may use it.
	pending []byte
	closed  chan struct{}
	once    sync.Once

	mu      sync.Mutex
	current *portConn // the connection that holds the token, if it has been accepted
}

func listenPort(path string) (*portListener, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return newPortListener(f)
}

func newPortListener(f *os.File) (*portListener, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	l := &portListener{file: f, raw: raw, free: make(chan struct{}, 1), closed: make(chan struct{})}
	l.free <- struct{}{}
	return l, nil
}

func (l *portListener) Addr() net.Addr { return channelAddr(l.file.Name()) }

func (l *portListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.file.Close()
}

func (l *portListener) Accept() (net.Conn, error) {
	conn, err := l.accept()
	if err != nil {
		return nil, err
	}
	return conn, nil
}

func (l *portListener) accept() (*portConn, error) {
	select {
	case <-l.free:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	if err := l.file.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	if len(l.pending) == 0 {
		if err := l.waitForHost(); err != nil {
			return nil, err
		}
	}
	conn := &portConn{File: l.file, listener: l}
	l.setCurrent(conn)
	return conn, nil
}

func (l *portListener) setCurrent(conn *portConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.current = conn
}

// HangUp ends the current connection, if there is one, as if its client had disconnected. What a client sends after that is
// for the next connection.
func (l *portListener) HangUp() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.current != nil {
		// The Read that is in progress or the next one fails, and marks the connection as ended. accept resets the deadline,
		// but not before Close, which waits for mu.
		_ = l.current.File.SetReadDeadline(past)
	}
}

// waitForHost waits until the host has sent something. It polls because a read returns io.EOF immediately while no host
// is connected.
func (l *portListener) waitForHost() error {
	return l.raw.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		return err == nil && n == 1 && fds[0].Revents == unix.POLLIN
	})
}

// portConn is the connection of one client.
type portConn struct {
	*os.File // of the listener
	listener *portListener

	reading sync.Mutex // held during Read; guards the fields below
	next    []byte     // the first bytes of the next client
	ended   bool

	once sync.Once
}

func (c *portConn) LocalAddr() net.Addr  { return c.listener.Addr() }
func (c *portConn) RemoteAddr() net.Addr { return c.listener.Addr() }

// Read returns the client's bytes. It returns io.EOF when the connection has ended.
func (c *portConn) Read(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	return c.read(p)
}

// read is Read for a caller that holds reading.
func (c *portConn) read(p []byte) (int, error) {
	if c.ended || len(p) == 0 {
		return 0, io.EOF
	}
	if pending := c.listener.pending; len(pending) > 0 {
		n := copy(p, pending)
		c.listener.pending = pending[n:]
		return n, nil
	}
	n, err := c.File.Read(p)
	if err != nil {
		c.end()
	}
	if errors.Is(err, os.ErrDeadlineExceeded) { // HangUp or Close
		err = io.EOF
	}
	return n, err
}

// end marks the connection as ended and makes writes fail. Otherwise a write would wait for the next client.
func (c *portConn) end() {
	c.ended = true
	_ = c.File.SetWriteDeadline(past)
}

// Close ends the connection and lets the listener accept the next client.
func (c *portConn) Close() error {
	c.once.Do(func() {
		_ = c.File.SetDeadline(past)
		c.reading.Lock()
		defer c.reading.Unlock()
		c.ended = true
		c.listener.pending = append(c.next, c.listener.pending...)
		c.listener.setCurrent(nil)
		c.listener.free <- struct{}{}
	})
	return nil
}

// ttrpcListener is a portListener for clients that speak ttrpc. A connection also ends when the next client sends a
// request.
type ttrpcListener struct{ *portListener }

func (l ttrpcListener) Accept() (net.Conn, error) {
	conn, err := l.accept()
	if err != nil {
		return nil, err
	}
	return &ttrpcConn{portConn: conn}, nil
}

// ttrpcConn is the connection of one client that speaks ttrpc.
type ttrpcConn struct {
	*portConn

	// Read uses these fields while it holds reading.
	frames     frameReader
	lastStream uint32 // stream id of the last request

	writing sync.Mutex // held during Write; guards the fields below
	sent    frameReader
	held    []byte // what is written with the rest of its frame
}

// Read returns the client's bytes. It returns io.EOF when the connection has ended.
func (c *ttrpcConn) Read(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	n, err := c.read(p)
	if err != nil {
		return n, err
	}
	// A client numbers its requests in increasing order. If the number of a request is not greater than the last one,
	// the request comes from another client.
	accepted, next := c.frames.scan(p[:n], func(stream uint32, kind byte) bool {
		if kind != ttrpcRequest {
			return true
		}
		last := c.lastStream
		c.lastStream = stream
		return stream > last
	})
	if next != nil {
		c.next = next
		c.end()
		if accepted == 0 {
			return 0, io.EOF
		}
	}
	return accepted, nil
}

// maxPortWrite is how many bytes the kernel accepts at once for the port.
const maxPortWrite = 32 << 10

// Write writes each frame at once, up to maxPortWrite, because each write to the port interrupts QEMU and the host's end of
// it. ttrpc writes a frame of more than 4 KiB in two pieces. It reports an error of the port with the write that
// completes a frame.
func (c *ttrpcConn) Write(p []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.sent.scan(p, func(uint32, byte) bool { return true })
	c.held = append(c.held, p...)
	if len(c.held) == 0 || c.sent.inFrame() && len(c.held) < maxPortWrite {
		return len(p), nil
	}
	_, err := c.File.Write(c.held)
	c.held = c.held[:0]
	if err != nil {
		return 0, err
	}
	return len(p), nil
}
