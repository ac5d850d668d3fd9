package channel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// frame returns a ttrpc request as it goes over the line.
func frame(stream uint32, payload string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(payload)))
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(append(b, ttrpcRequest, 0), payload...)
}

// newTestPort returns a listener on one end of a socket pair, and the other end.
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
	return l, host
}

// TestPortTellsCallersApart sends two callers' requests without a break between them.
func TestPortTellsCallersApart(t *testing.T) {
	first := append(frame(1, "one"), frame(3, "two")...)
	second := append(frame(1, "three"), frame(3, "four")...)
	for size := 1; size <= len(first)+len(second); size++ { // of the reader's buffer
		l, host := newTestPort(t)
		if _, err := host.Write(append(bytes.Clone(first), second...)); err != nil {
			t.Fatal(err)
		}
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		got := readInPieces(t, conn, size)
		// A header that came in pieces shows in part; what parses is whole.
		if !bytes.HasPrefix(got, first) || len(got) >= len(first)+ttrpcHeader {
			t.Fatalf("pieces of %d: first caller got %q", size, got)
		}
		if _, err := conn.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("an answer after the end: %v", err)
		}
		conn.Close()
		if conn, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		if err := unix.Shutdown(int(host.Fd()), unix.SHUT_WR); err != nil {
			t.Fatal(err)
		}
		if got := readInPieces(t, conn, size); !bytes.Equal(got, second) {
			t.Fatalf("pieces of %d: second caller got %q", size, got)
		}
		conn.Close()
	}
}

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

// TestPortCloseEndsARead checks that a connection closes while somebody reads from it.
func TestPortCloseEndsARead(t *testing.T) {
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
		t.Error("the read went on")
	}
}
