package portal

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

type dialStream = grpc.BidiStreamingServer[portalv1.DialRequest, portalv1.DialResponse]

// connectTimeout is how long a program may take to accept a connection.
const connectTimeout = 10 * time.Second

// halfConn is a connection whose directions end separately.
type halfConn interface {
	net.Conn
	CloseWrite() error
}

// Dial implements portalv1.FileServiceServer.
func (s *fileServer) Dial(stream dialStream) error {
	req, err := stream.Recv()
	if err != nil && err != io.EOF {
		return err
	}
	conn, err := s.connect(stream.Context(), req)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := stream.Send(&portalv1.DialResponse{}); err != nil {
		return err
	}
	// The end of the call interrupts reads and writes.
	defer context.AfterFunc(stream.Context(), func() { conn.Close() })()

	toProgram := make(chan error, 1)
	go func() { toProgram <- copyToProgram(conn, stream) }()
	// A connection would be copied without the buffer if it were not only a Reader.
	_, err = io.CopyBuffer(pieces(func(data []byte) error { return stream.Send(&portalv1.DialResponse{Data: data}) }),
		struct{ io.Reader }{conn}, make([]byte, pieceSize))
	if errors.Is(err, net.ErrClosed) {
		err = <-toProgram
	}
	if err != nil {
		return dialError(stream, err)
	}
	if err := stream.Send(&portalv1.DialResponse{End: true}); err != nil {
		return err
	}
	return dialError(stream, <-toProgram)
}

// copyToProgram copies the data of the client to conn, until the client ends its direction. If the client fails, it
// closes conn.
func copyToProgram(conn halfConn, stream dialStream) error {
	for {
		req, err := stream.Recv()
		if err == io.EOF {
			// If it fails, the program has closed the connection.
			_ = conn.CloseWrite()
			return nil
		}
		if err != nil {
			conn.Close()
			return err
		}
		if _, ok := req.GetPart().(*portalv1.DialRequest_Data); !ok {
			conn.Close()
			return status.Error(codes.InvalidArgument, "a message after the first has no data")
		}
		if _, err := conn.Write(req.GetData()); err != nil {
			return err
		}
	}
}

// dialError returns the gRPC status for an error of a connection.
func dialError(stream dialStream, err error) error {
	if err == nil {
		return nil
	}
	if ctx := stream.Context(); ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.FailedPrecondition, "the program in the sandbox closed the connection before it had read everything")
}

// connect connects to the address in req.
func (s *fileServer) connect(ctx context.Context, req *portalv1.DialRequest) (halfConn, error) {
	switch part := req.GetPart().(type) {
	case *portalv1.DialRequest_TcpPort:
		return connectTCP(ctx, part.TcpPort)
	case *portalv1.DialRequest_UnixPath:
		return s.connectUnix(ctx, part.UnixPath)
	}
	return nil, status.Error(codes.InvalidArgument, "the first message has no address")
}

func connectTCP(ctx context.Context, port uint32) (halfConn, error) {
	if port < 1 || port > 65535 {
		return nil, status.Errorf(codes.InvalidArgument, "port %d is invalid: use 1 to 65535", port)
	}
	var first error
	for _, ip := range []string{"127.0.0.1", "::1"} {
		d := net.Dialer{Timeout: connectTimeout}
		conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(ip, strconv.Itoa(int(port))))
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		if first == nil {
			first = err
		}
	}
	if errors.Is(first, unix.ECONNREFUSED) {
		return nil, status.Errorf(codes.NotFound, "nothing listens on port %d in the sandbox", port)
	}
	return nil, connectError(ctx, "port "+strconv.Itoa(int(port)), first)
}

func (s *fileServer) connectUnix(ctx context.Context, path string) (halfConn, error) {
	switch {
	case strings.ContainsRune(path, 0), !filepath.IsAbs(path) && !strings.HasPrefix(path, "@"):
		return nil, status.Errorf(codes.InvalidArgument, "socket %s is invalid: use an absolute path, or \"@\" and the name of an abstract socket", quote(path))
	case len(path) > len(unix.RawSockaddrUnix{}.Path)-1:
		return nil, status.Errorf(codes.InvalidArgument, "socket %s is too long: the address of a socket has at most 107 bytes", quote(path))
	case path == s.socket:
		return nil, status.Error(codes.FailedPrecondition, "this is the socket of the portal, which only msbd may use: name another one")
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		return conn.(*net.UnixConn), nil
	}
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) {
		return nil, status.Errorf(codes.NotFound, "nothing listens on the socket %s in the sandbox", quote(path))
	}
	return nil, connectError(ctx, "socket "+quote(path), err)
}

// connectError returns the gRPC status for an error of a connect to address.
func connectError(ctx context.Context, address string, err error) error {
	var errno unix.Errno
	switch {
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	case errors.Is(err, unix.EAGAIN), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return status.Errorf(codes.ResourceExhausted, "%s has too many connections that wait to be accepted: try again", address)
	case errors.As(err, &errno):
		err = errno
	}
	return status.Errorf(codes.FailedPrecondition, "cannot connect to the %s in the sandbox: %v", address, err)
}
