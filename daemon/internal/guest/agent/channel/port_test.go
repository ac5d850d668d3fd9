package channel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// frame returns the ttrpc frame of a request.
func frame(stream uint32, payload string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(payload)))
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(append(b, ttrpcRequest, 0), payload...)
}

// newTestPort returns a listener for ttrpc clients on one end of a socket pair, and the host's end.
func newTestPort(t *testing.T) (net.Listener, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	host := os.NewFile(uintptr(fds[1]), "host")
	l, err := newPortListener(os.NewFile(uintptr(fds[0]), "port"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Close()
		host.Close()
	})
	return ttrpcListener{l}, host
}

// TestPortSeparatesClients sends the requests of two clients without a pause between them. It reads them with buffers of
// every size.
func TestPortSeparatesClients(t *testing.T) {
	first := append(frame(1, "one"), frame(3, "two")...)
	second := append(frame(1, "three"), frame(3, "four")...)
	for size := 1; size <= len(first)+len(second); size++ {
		l, host := newTestPort(t)
		if _, err := host.Write(append(bytes.Clone(first), second...)); err != nil {
			t.Fatal(err)
		}
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		got := readInPieces(t, conn, size)
		// If the second client's first header arrives in pieces, the first connection may get a part of it, but never
		// all of it.
		if !bytes.HasPrefix(got, first) || len(got) >= len(first)+ttrpcHeader {
			t.Fatalf("buffer of %d bytes: first connection got %q, want %q", size, got, first)
		}
		if _, err := conn.Write(frame(1, "x")); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("buffer of %d bytes: write after the end: %v, want os.ErrDeadlineExceeded", size, err)
		}
		conn.Close()
		if conn, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		conn.(*ttrpcConn).doubtUntil = time.Time{} // the next disconnection ends the connection
		if err := unix.Shutdown(int(host.Fd()), unix.SHUT_WR); err != nil {
			t.Fatal(err)
		}
		if got := readInPieces(t, conn, size); !bytes.Equal(got, second) {
			t.Fatalf("buffer of %d bytes: second connection got %q, want %q", size, got, second)
		}
		conn.Close()
	}
}

// readInPieces reads until io.EOF with a buffer of size bytes.
func readInPieces(t *testing.T, r io.Reader, size int) []byte {
	t.Helper()
	var all []byte
	buf := make([]byte, size)
	for {
		n, err := r.Read(buf)
		all = append(all, buf[:n]...)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestPortCloseEndsRead checks that Close ends a Read that is in progress.
func TestPortCloseEndsRead(t *testing.T) {
	l, host := newTestPort(t)
	if _, err := host.Write(frame(1, "")); err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, ttrpcHeader)); err != nil {
		t.Fatal(err)
	}
	read := make(chan error)
	go func() {
		_, err := conn.Read(make([]byte, 1))
		read <- err
	}()
	conn.Close()
	if err := <-read; err == nil {
		t.Error("read after Close returned no error")
	}
}

// TestPortHangUp ends a connection whose client does not disconnect. The next client has a connection of its own, with the
// same stream ids.
func TestPortHangUp(t *testing.T) {
	l, host := newTestPort(t)
	port := l.(ttrpcListener)
	port.HangUp() // there is none
	for _, payload := range []string{"builder", "restored"} {
		sent := frame(9, payload)
		if _, err := host.Write(sent); err != nil {
			t.Fatal(err)
		}
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		// The port has not reported the disconnection of the builder, and may still do so.
		if late := !conn.(*ttrpcConn).doubtUntil.IsZero(); late != (payload == "restored") {
			t.Errorf("the port may report the disconnection of a client before %q: %t", payload, late)
		}
		got := make([]byte, len(sent))
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("read %q, %v, want %q", got, err, sent)
		}
		read := make(chan error)
		go func() {
			_, err := conn.Read(make([]byte, 1))
			read <- err
		}()
		port.HangUp()
		if err := <-read; err != io.EOF {
			t.Errorf("read after HangUp: %v, want io.EOF", err)
		}
		if _, err := conn.Write(frame(9, "x")); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("write after HangUp: %v, want os.ErrDeadlineExceeded", err)
		}
		conn.Close()
	}
	// There is no connection, and one that begins later is not affected.
	accepted := make(chan error)
	go func() {
		_, err := l.Accept()
		accepted <- err
	}()
	for len(port.free) > 0 { // until Accept waits for the client
		runtime.Gosched()
	}
	for range 1000 {
		port.HangUp()
		runtime.Gosched()
	}
	if _, err := host.Write(frame(1, "")); err != nil {
		t.Fatal(err)
	}
	if err := <-accepted; err != nil {
		t.Errorf("accept after HangUp: %v", err)
	}
}

// TestPortReportsDisconnectionLate has the port report a disconnection at different times. The port is a FIFO, which, like a
// port, reports that nobody has it open for writing.
func TestPortReportsDisconnectionLate(t *testing.T) {
	for name, tt := range map[string]struct {
		// before is what the guest reads before the port reports the first client's disconnection. after is what it reads
		// after that.
		before, after string
		// continues says that the connection with the last bytes of before continues.
		continues bool
	}{
		"after a request":  {string(frame(1, "one")) + string(frame(1, "two")), string(frame(3, "three")), true},
		"within a request": {string(frame(1, "one")) + string(frame(1, "two"))[:12], string(frame(1, "three")), false},
		"in time":          {string(frame(1, "one")), string(frame(3, "two")), false},
	} {
		t.Run(name, func(t *testing.T) {
			fifo := filepath.Join(t.TempDir(), "port")
			if err := unix.Mkfifo(fifo, 0o600); err != nil {
				t.Fatal(err)
			}
			port, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
			if err != nil {
				t.Fatal(err)
			}
			l, err := newPortListener(port)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			connect := func() *os.File {
				host, err := os.OpenFile(fifo, os.O_WRONLY, 0)
				if err != nil {
					t.Fatal(err)
				}
				return host
			}
			host := connect()
			// The next client is reported as connected when the listener looks for it.
			l.raw = lookedAt{l.raw, sync.OnceFunc(func() {
				host = connect()
				write(t, host, tt.after)
			})}
			write(t, host, tt.before)
			var conn net.Conn
			for read := 0; read < len(tt.before); {
				if conn, err = (ttrpcListener{l}).Accept(); err != nil {
					t.Fatal(err)
				}
				for read < len(tt.before) {
					n, err := conn.Read(make([]byte, 64))
					read += n
					if err != nil {
						conn.Close()
						break
					}
				}
			}
			host.Close()
			got := make([]byte, 64)
			n, err := conn.Read(got)
			if tt.continues && (string(got[:n]) != tt.after || err != nil) {
				t.Errorf("got %q, %v; want %q", got[:n], err, tt.after)
			}
			if !tt.continues && err != io.EOF {
				t.Errorf("got %q, %v; want io.EOF", got[:n], err)
			}
			host.Close()
		})
	}
}

func write(t *testing.T, host *os.File, data string) {
	t.Helper()
	if _, err := host.WriteString(data); err != nil {
		t.Fatal(err)
	}
}

// lookedAt calls look before each look at the state of a port.
type lookedAt struct {
	syscall.RawConn
	look func()
}

func (l lookedAt) Control(f func(fd uintptr)) error {
	l.look()
	return l.RawConn.Control(f)
}

// TestPortWritesFramesAtOnce writes frames as ttrpc does. Each arrives in one packet.
func TestPortWritesFramesAtOnce(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	host := os.NewFile(uintptr(fds[1]), "host")
	defer host.Close()
	l, err := newPortListener(os.NewFile(uintptr(fds[0]), "port"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := host.Write(frame(1, "request")); err != nil {
		t.Fatal(err)
	}
	conn, err := ttrpcListener{l}.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	packet := make([]byte, 64<<10)
	for _, f := range [][]byte{frame(1, ""), frame(3, "one"), frame(5, string(make([]byte, 4<<10))), frame(7, "two")} {
		for _, part := range [][]byte{f[:4], f[4:ttrpcHeader], f[ttrpcHeader:]} {
			if n, err := conn.Write(part); n != len(part) || err != nil {
				t.Fatal(n, err)
			}
		}
		n, err := host.Read(packet)
		if err != nil || !bytes.Equal(packet[:n], f) {
			t.Fatalf("a frame of %d bytes arrives as %d bytes, error %v", len(f), n, err)
		}
	}
	// A frame that is longer than what the kernel accepts at once is not held.
	long := frame(9, string(make([]byte, 3*maxPortWrite)))
	var got int
	for part := range slices.Chunk(long, maxPortWrite) {
		if _, err := conn.Write(part); err != nil {
			t.Fatal(err)
		}
		for got < len(long) {
			n, err := unix.Read(fds[1], packet)
			if err != nil {
				break
			}
			got += n
		}
	}
	if got != len(long) {
		t.Errorf("%d bytes of a long frame arrived, want %d", got, len(long))
	}
}
