package channel

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// past is a deadline that ends whatever waits.
var past = time.Unix(1, 0)

// portListener makes a listener of a virtio-serial port, a line on which one caller follows the
// other: one connection at a time, from the first byte of a caller until it hangs up or the next
// one calls. The port stays open throughout: closing it would drop what the next one has sent.
type portListener struct {
	file *os.File
	raw  syscall.RawConn
	free chan struct{} // holds a token while there is no connection
	// pending is what was read of the next caller already; it goes with the token.
	pending []byte
	done    chan struct{}
	once    sync.Once
}

func listenPort(path string) (net.Listener, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return newPortListener(f)
}

func newPortListener(f *os.File) (net.Listener, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	l := &portListener{file: f, raw: raw, free: make(chan struct{}, 1), done: make(chan struct{})}
	l.free <- struct{}{}
	return l, nil
}

func (l *portListener) Addr() net.Addr { return channelAddr(l.file.Name()) }

func (l *portListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.file.Close()
}

func (l *portListener) Accept() (net.Conn, error) {
	select {
	case <-l.free:
	case <-l.done:
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
	return &portConn{File: l.file, listener: l}, nil
}

// waitForHost returns when the host has sent something. Without a host the port reads as ended, so
// that a plain read would not wait.
func (l *portListener) waitForHost() error {
	return l.raw.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		return err == nil && n == 1 && fds[0].Revents == unix.POLLIN
	})
}

// portConn is one caller's time on the line.
type portConn struct {
	*os.File // of the listener
	listener *portListener

	reading sync.Mutex
	frames  frameReader
	last    uint32 // the last request's stream
	next    []byte // the next caller's first bytes
	ended   bool

	once sync.Once
}

func (c *portConn) LocalAddr() net.Addr  { return c.listener.Addr() }
func (c *portConn) RemoteAddr() net.Addr { return c.listener.Addr() }

// Read returns the caller's bytes, and io.EOF at the end of its time.
func (c *portConn) Read(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	if c.ended || len(p) == 0 {
		return 0, io.EOF
	}
	var n int
	var err error
	if pending := c.listener.pending; len(pending) > 0 {
		n = copy(p, pending)
		c.listener.pending = pending[n:]
	} else if n, err = c.File.Read(p); err != nil {
		c.end()
		return n, err
	}
	// A caller numbers its requests upwards: a number that comes again is another caller's. The line
	// does not tell: a caller that follows at once goes unnoticed, as does the one after a restored
	// snapshot.
	own, next := c.frames.scan(p[:n], func(stream uint32, kind byte) bool {
		if kind != ttrpcRequest {
			return true
		}
		last := c.last
		c.last = stream
		return stream > last
	})
	if next != nil {
		c.next = next
		c.end()
		if own == 0 {
			return 0, io.EOF
		}
	}
	return own, nil
}

// end is the end of the caller's time. A write to nobody would wait for the next one.
func (c *portConn) end() {
	c.ended = true
	_ = c.File.SetWriteDeadline(past)
}

// Close gives the line to the next caller.
func (c *portConn) Close() error {
	c.once.Do(func() {
		_ = c.File.SetDeadline(past)
		c.reading.Lock()
		defer c.reading.Unlock()
		c.ended = true
		c.listener.pending = append(c.next, c.listener.pending...)
		c.listener.free <- struct{}{}
	})
	return nil
}
