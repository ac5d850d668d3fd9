package portal

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestMove moves a part of a file into a pipe of the size that every user may have, into a socket, to which the kernel cannot
// move it, and into a TCP connection.
func TestMove(t *testing.T) {
	content := make([]byte, 1<<20)
	rand.Read(content)
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	reader, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	sockets, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	host, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	type ends struct {
		reader io.ReadCloser
		writer interface {
			io.Closer
			move(f *os.File, offset, length int64) error
		}
	}
	reading, writing := os.NewFile(uintptr(sockets[0]), "socket"), os.NewFile(uintptr(sockets[1]), "socket")
	for name, ends := range map[string]ends{
		"pipe": {reader, out{&pipes{out: pipe}}}, "socket": {reading, out{&pipes{out: writing}}}, "TCP": {host, &direct{conn.(*net.TCPConn), ""}},
	} {
		p := ends.writer
		for what, part := range map[string]struct{ offset, length, got int64 }{
			"all": {0, 1 << 20, 1 << 20}, "part": {12345, 654321, 654321}, "none": {7, 0, 0}, "too much": {1<<20 - 10, 100, 10},
		} {
			moved := make(chan error, 1)
			go func() { moved <- p.move(f, part.offset, part.length) }()
			got := make([]byte, part.got)
			if _, err := io.ReadFull(ends.reader, got); err != nil {
				t.Fatal(err)
			}
			var want error
			if part.got < part.length {
				want = io.ErrUnexpectedEOF
			}
			if err := <-moved; err != want || !bytes.Equal(got, content[part.offset:part.offset+part.got]) {
				t.Errorf("%s, %s: %v, want %v, or other bytes", name, what, err, want)
			}
		}
		// Its end ends move.
		moved := make(chan error, 1)
		go func() {
			var err error
			for err == nil { // until the buffers are full
				err = p.move(f, 0, 1<<20)
			}
			moved <- err
		}()
		if _, err := io.ReadFull(ends.reader, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		p.Close()
		if err := <-moved; err != errTransferEnded {
			t.Errorf("%s: after it was closed: %v", name, err)
		}
		ends.reader.Close()
	}
}

// out is pipes of which only out is open.
type out struct{ *pipes }

func (o out) Close() error { return o.out.Close() }

// A bridge that comes after the offer has ended is closed, at whatever moment the offer ends.
func TestTransferThatIsNotOffered(t *testing.T) {
	id := strings.Repeat("0", transferID)
	connect := func() *pipes {
		sockets, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(sockets[1])
		file := os.NewFile(uintptr(sockets[0]), "socket")
		defer file.Close()
		conn, err := net.FileConn(file)
		if err != nil {
			t.Fatal(err)
		}
		in, out, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		return &pipes{in: in, out: out, bridge: conn.(*net.UnixConn), transfer: id}
	}
	transfers := newTransfers()
	if _, err := transfers.wait(t.Context(), "id", func() error { return nil }); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a short id: %v", err)
	}
	refused := errors.New("the offer could not be sent")
	for range 200 {
		p := connect()
		ctx, cancel := context.WithCancel(t.Context())
		go cancel()
		begun := make(chan struct{})
		got, err := transfers.wait(ctx, id, func() error {
			if _, err := transfers.wait(ctx, id, nil); status.Code(err) != codes.InvalidArgument {
				t.Errorf("an id that is in use: %v", err)
			}
			go func() { defer close(begun); transfers.begin(p) }()
			return nil
		})
		<-begun
		if got != nil && got != p || err != nil {
			t.Fatal(got, err)
		}
		if _, err := p.out.Write(nil); (err == nil) != (got == p) {
			t.Fatalf("the transfer began: %t, its pipe: %v", got == p, err)
		}
		p.Close()
		if _, err := transfers.wait(t.Context(), id, func() error { return refused }); err != refused {
			t.Fatal(err)
		}
		if len(transfers.offered) != 0 {
			t.Fatal("an offer is left")
		}
	}
}
