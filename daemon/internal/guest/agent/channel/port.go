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

const (
	// doubtTime is how long after the first bytes of a client the port may report the disconnection of the client before.
	doubtTime = time.Second
	// doubtPause is the time between two looks at a port whose client may still be connected.
	doubtPause = time.Millisecond
)

// portListener is a listener on a virtio-serial port. The port is a single byte stream. One client after another uses
// it, so there is one connection at a time. A connection starts with the first byte from a client. It ends when the
// client disconnects. The port stays open between connections, because closing it would drop the bytes that the next
// client has already sent. The port does not report a change of clients if the next one connects immediately, or if the
// guest was restored from a snapshot. Both clients then use the same connection.
//
// The port may report a change of clients late, because QEMU sends bytes and connection changes over two queues, and
// Linux handles the changes in a kernel thread. So the guest may read bytes of the next client before it sees that the
// client before has disconnected. Then it sees no host for some milliseconds, although the next client waits for a
// response.
type portListener struct {
	file *os.File
	raw  syscall.RawConn
	free chan struct{} // holds a token while there is no connection
	// pending has the bytes of the next client that have already been read. Only the holder of the token may use it.
	pending []byte
	// hungUp says that the port has reported the disconnection of the last client. The holder of the token may use it, and
	// the holder of the connection's reading.
	hungUp bool
	closed chan struct{}
	once   sync.Once

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
	l := &portListener{file: f, raw: raw, free: make(chan struct{}, 1), hungUp: true, closed: make(chan struct{})}
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
	if !l.hungUp {
		conn.doubtUntil = time.Now().Add(doubtTime)
	}
	l.hungUp = false
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
	return l.raw.Read(func(fd uintptr) bool { return portEvents(fd) == unix.POLLIN })
}

// portEvents returns which of POLLIN and POLLHUP are true for a port. POLLHUP means that no host is connected.
func portEvents(fd uintptr) int16 {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds, 0); err != nil {
		return 0
	}
	return fds[0].Revents
}

// portConn is the connection of one client.
type portConn struct {
	*os.File // of the listener
	listener *portListener

	// Until doubtUntil, the port may report the disconnection of the client before. It is zero if the port has already
	// done so.
	doubtUntil time.Time

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
	return c.read(p, nil)
}

// read is Read for a caller that holds reading. When the port reports a disconnection, read calls continues, unless it is
// nil. The connection ends unless continues returns true.
func (c *portConn) read(p []byte, continues func() bool) (int, error) {
	if c.ended || len(p) == 0 {
		return 0, io.EOF
	}
	if pending := c.listener.pending; len(pending) > 0 {
		n := copy(p, pending)
		c.listener.pending = pending[n:]
		return n, nil
	}
	n, err := c.File.Read(p)
	for err == io.EOF && continues != nil && continues() {
		n, err = c.File.Read(p)
	}
	if err != nil {
		c.listener.hungUp = err == io.EOF
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
	n, err := c.read(p, c.continues)
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

// continues reports whether the connection continues after a disconnection, because it may be that of the client before.
// It waits until a host is connected. If that is another client, its first request will end the connection. Within a frame,
// a disconnection always ends the connection. Otherwise, the bytes of another client could become the rest of the frame.
func (c *ttrpcConn) continues() bool {
	for !c.frames.inFrame() && time.Now().Before(c.doubtUntil) {
		connected := false
		err := c.listener.raw.Control(func(fd uintptr) { connected = portEvents(fd)&unix.POLLHUP == 0 })
		if connected || err != nil {
			return connected
		}
		time.Sleep(doubtPause)
	}
	return false
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
