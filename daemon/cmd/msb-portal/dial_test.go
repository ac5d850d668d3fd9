package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

type dialStream = grpc.BidiStreamingClient[portalv1.DialRequest, portalv1.DialResponse]

func tcpPort(port int) *portalv1.DialRequest {
	return &portalv1.DialRequest{Part: &portalv1.DialRequest_TcpPort{TcpPort: uint32(port)}}
}

func unixPath(path string) *portalv1.DialRequest {
	return &portalv1.DialRequest{Part: &portalv1.DialRequest_UnixPath{UnixPath: path}}
}

func bytesToProgram(data []byte) *portalv1.DialRequest {
	return &portalv1.DialRequest{Part: &portalv1.DialRequest_Data{Data: data}}
}

// dial connects, and returns the error of the first response.
func (c files) dial(ctx context.Context, address *portalv1.DialRequest) (dialStream, error) {
	stream, err := c.Dial(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(address); err != nil {
		return nil, err
	}
	resp, err := stream.Recv()
	if err == nil && (len(resp.GetData()) > 0 || resp.GetEnd()) {
		err = fmt.Errorf("the first response is %v", resp)
	}
	return stream, err
}

// receive returns the data until the program's direction ends.
func receive(stream dialStream) ([]byte, error) {
	var data []byte
	for {
		resp, err := stream.Recv()
		if err != nil || resp.GetEnd() {
			return data, err
		}
		if n := len(resp.GetData()); n == 0 || n > 64<<10 {
			return data, fmt.Errorf("a message has %d bytes", n)
		}
		data = append(data, resp.GetData()...)
	}
}

// listen serves one connection with each address that Dial knows.
func listen(t *testing.T, serve func(t *testing.T, c files, address *portalv1.DialRequest, lis net.Listener)) {
	path := filepath.Join(t.TempDir(), "socket")
	abstract := newGuest().socket
	for _, p := range []struct{ name, network, address string }{
		{"IPv4", "tcp4", "127.0.0.1:0"}, {"IPv6", "tcp6", "[::1]:0"}, {"Unix", "unix", path}, {"abstract", "unix", abstract},
	} {
		t.Run(p.name, func(t *testing.T) {
			lis, err := net.Listen(p.network, p.address)
			noError(t, err)
			defer lis.Close()
			address := unixPath(p.address)
			if tcp, ok := lis.Addr().(*net.TCPAddr); ok {
				address = tcpPort(tcp.Port)
			}
			serve(t, startFiles(t, 0), address, lis)
		})
	}
}

// TestDialEcho sends 16 MiB to a program that returns them, at a time when neither side would read without the other.
func TestDialEcho(t *testing.T) {
	t.Parallel()
	listen(t, func(t *testing.T, c files, address *portalv1.DialRequest, lis net.Listener) {
		echoed := make(chan error, 1)
		go func() {
			conn, err := lis.Accept()
			if err == nil {
				_, err = io.Copy(conn, struct{ io.Reader }{conn})
				conn.Close()
			}
			echoed <- err
		}()
		stream, err := c.dial(t.Context(), address)
		noError(t, err)
		data := make([]byte, 16<<20)
		rand.Read(data)
		sent := make(chan error, 1)
		go func() {
			for piece := range slices.Chunk(data, 50_001) {
				if err := stream.Send(bytesToProgram(piece)); err != nil {
					sent <- err
					return
				}
			}
			sent <- stream.CloseSend()
		}()
		got, err := receive(stream)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("got %d bytes, error %v", len(got), err)
		}
		if _, err := stream.Recv(); err != io.EOF {
			t.Errorf("the end of the call: %v", err)
		}
		noError(t, <-sent)
		noError(t, <-echoed)
	})
}

// TestDialHalfClose ends each direction while the other is used.
func TestDialHalfClose(t *testing.T) {
	t.Parallel()
	listen(t, func(t *testing.T, c files, address *portalv1.DialRequest, lis net.Listener) {
		stream, err := c.dial(t.Context(), address)
		noError(t, err)
		conn, err := lis.Accept()
		noError(t, err)
		defer conn.Close()
		half := conn.(interface{ CloseWrite() error })

		// The program ends its direction first.
		_, err = conn.Write([]byte("hello"))
		noError(t, err)
		noError(t, half.CloseWrite())
		if got, err := receive(stream); err != nil || string(got) != "hello" {
			t.Errorf("got %q, error %v", got, err)
		}
		noError(t, stream.Send(bytesToProgram([]byte("question"))))
		noError(t, stream.CloseSend())
		if got, err := io.ReadAll(conn); err != nil || string(got) != "question" {
			t.Errorf("the program got %q, error %v", got, err)
		}
		if _, err := stream.Recv(); err != io.EOF {
			t.Errorf("the end of the call: %v", err)
		}

		// The client ends its direction first.
		stream, err = c.dial(t.Context(), address)
		noError(t, err)
		second, err := lis.Accept()
		noError(t, err)
		noError(t, stream.CloseSend())
		if got, err := io.ReadAll(second); err != nil || len(got) > 0 {
			t.Errorf("the program got %q, error %v", got, err)
		}
		_, err = second.Write([]byte("answer"))
		noError(t, err)
		second.Close()
		if got, err := receive(stream); err != nil || string(got) != "answer" {
			t.Errorf("got %q, error %v", got, err)
		}
		if _, err := stream.Recv(); err != io.EOF {
			t.Errorf("the end of the call: %v", err)
		}
	})
}

// TestDialEnds ends a connection from each side.
func TestDialEnds(t *testing.T) {
	t.Parallel()
	listen(t, func(t *testing.T, c files, address *portalv1.DialRequest, lis net.Listener) {
		ctx, cancel := context.WithCancel(t.Context())
		_, err := c.dial(ctx, address)
		noError(t, err)
		conn, err := lis.Accept()
		noError(t, err)
		cancel()
		if got, _ := io.ReadAll(conn); len(got) > 0 {
			t.Errorf("the program got %q", got)
		}
		conn.Close()

		// A program that closes the connection does not get what the client sends later.
		stream, err := c.dial(t.Context(), address)
		noError(t, err)
		conn, err = lis.Accept()
		noError(t, err)
		conn.Close()
		_, err = receive(stream)
		noError(t, err)
		for err == nil {
			err = stream.Send(bytesToProgram(make([]byte, 1000)))
		}
		_, err = stream.Recv()
		wantError(t, "a closed connection", err, codes.FailedPrecondition, "closed the connection")

		// The client breaks the protocol.
		stream, err = c.dial(t.Context(), address)
		noError(t, err)
		conn, err = lis.Accept()
		noError(t, err)
		noError(t, stream.Send(address))
		_, err = stream.Recv()
		wantError(t, "two addresses", err, codes.InvalidArgument, "no data")
		if got, _ := io.ReadAll(conn); len(got) > 0 {
			t.Errorf("the program got %q", got)
		}
		conn.Close()
	})
}

// TestDialBackpressure sends to a program that does not read, until the connection takes no more.
func TestDialBackpressure(t *testing.T) {
	t.Parallel()
	c := startFiles(t, 0)
	lis, err := net.Listen("unix", newGuest().socket)
	noError(t, err)
	defer lis.Close()
	// A socket holds less than 1 MiB, and the window of a call is 1 MiB.
	const most = 8 << 20
	stream, err := c.dial(t.Context(), unixPath(lis.Addr().String()))
	noError(t, err)
	conn, err := lis.Accept()
	noError(t, err)
	defer conn.Close()
	sent := make(chan int)
	go func() {
		defer close(sent)
		for stream.Send(bytesToProgram(make([]byte, 64<<10))) == nil {
			sent <- 64 << 10
		}
	}()
	// Another call works meanwhile, and by its end the first one is blocked or too far.
	total := 0
	for range 200 {
		select {
		case n := <-sent:
			total += n
		default:
			c.stat(t, "/")
		}
	}
	if total > most {
		t.Errorf("the portal took %d bytes that nobody reads", total)
	}
	// The program reads, so the rest can be sent.
	go func() { _, _ = io.Copy(io.Discard, conn) }()
	for total <= most {
		total += <-sent
	}
	conn.Close()
	for range sent {
	}
}

// TestDialCanceledDuringWrite ends a call while the portal waits for a program that does not read.
func TestDialCanceledDuringWrite(t *testing.T) {
	t.Parallel()
	c := startFiles(t, 0)
	lis, err := net.Listen("unix", newGuest().socket)
	noError(t, err)
	defer lis.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := c.dial(ctx, unixPath(lis.Addr().String()))
	noError(t, err)
	conn, err := lis.Accept()
	noError(t, err)
	defer conn.Close()
	// It fits into the window of the call, but not into the socket.
	for range 15 {
		noError(t, stream.Send(bytesToProgram(make([]byte, 64<<10))))
	}
	_, err = conn.Read(make([]byte, 1))
	noError(t, err)
	cancel()
	f, err := conn.(*net.UnixConn).File()
	noError(t, err)
	defer f.Close()
	events := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLRDHUP}}
	for err = unix.EINTR; err == unix.EINTR; {
		_, err = unix.Poll(events, -1)
	}
	noError(t, err)
}

// TestDialOfClient reads to the end of the program's direction before the client ends its own.
func TestDialOfClient(t *testing.T) {
	t.Parallel()
	lis, err := net.Listen("unix", newGuest().socket)
	noError(t, err)
	defer lis.Close()
	client, err := startGuest(t).connect(t).Dial(t.Context(), sandbox.Address{Unix: lis.Addr().String()})
	noError(t, err)
	defer client.Close()
	program, err := lis.Accept()
	noError(t, err)
	defer program.Close()
	_, err = program.Write([]byte("hello"))
	noError(t, err)
	noError(t, program.(*net.UnixConn).CloseWrite())
	if got, err := io.ReadAll(client); err != nil || string(got) != "hello" {
		t.Errorf("the client got %q, error %v", got, err)
	}
	_, err = client.Write([]byte("bye"))
	noError(t, err)
	noError(t, client.CloseWrite())
	if got, err := io.ReadAll(program); err != nil || string(got) != "bye" {
		t.Errorf("the program got %q, error %v", got, err)
	}
}

func TestDialErrors(t *testing.T) {
	t.Parallel()
	g := newGuest()
	g.serve(t)
	c := files{portalv1.NewFileServiceClient(g.dial(t).conn), 0}
	lis, err := net.Listen("tcp4", "127.0.0.1:0")
	noError(t, err)
	port := lis.Addr().(*net.TCPAddr).Port
	lis.Close()
	file := filepath.Join(t.TempDir(), "file")
	create(t, file, "", 0o600)
	for what, p := range map[string]struct {
		address *portalv1.DialRequest
		code    codes.Code
		text    string
	}{
		"no listener":          {tcpPort(port), codes.NotFound, fmt.Sprintf("nothing listens on port %d in the sandbox", port)},
		"port 0":               {tcpPort(0), codes.InvalidArgument, "port 0"},
		"port 65536":           {tcpPort(65536), codes.InvalidArgument, "port 65536"},
		"no socket":            {unixPath(file + "2"), codes.NotFound, "nothing listens"},
		"file":                 {unixPath(file), codes.NotFound, "nothing listens"},
		"no abstract socket":   {unixPath("@msb-portal-test-none"), codes.NotFound, "nothing listens"},
		"below a file":         {unixPath(file + "/x"), codes.FailedPrecondition, "not a directory"},
		"relative":             {unixPath("socket"), codes.InvalidArgument, "absolute"},
		"empty":                {unixPath(""), codes.InvalidArgument, "absolute"},
		"NUL":                  {unixPath("\x00" + strings.TrimPrefix(g.socket, "@")), codes.InvalidArgument, "absolute"},
		"NUL inside":           {unixPath("/tmp/\x00"), codes.InvalidArgument, "absolute"},
		"long":                 {unixPath("/" + strings.Repeat("x", 107)), codes.InvalidArgument, "too long"},
		"the portal":           {unixPath(g.socket), codes.FailedPrecondition, "portal"},
		"data instead of that": {bytesToProgram([]byte("x")), codes.InvalidArgument, "address"},
		"nothing":              {&portalv1.DialRequest{}, codes.InvalidArgument, "address"},
	} {
		_, err := c.dial(t.Context(), p.address)
		wantError(t, what, err, p.code, p.text)
	}
}
