// Package portalclient is msbd's client of the portal in a sandbox. It implements sandbox.Portal over a byte stream
// that the backend opens. Only package daemon imports this package.
package portalclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// window is the gRPC flow-control window. It is the number of bytes of output that a sandbox may send before msbd reads
// them.
const window = 1 << 20

// Client is a connection to one portal. It is safe for concurrent use. It does not reconnect. Once the stream has
// ended, every call returns errdefs.ErrUnavailable.
type Client struct {
	conn *grpc.ClientConn
	rpc  portalv1.PortalServiceClient
}

var _ sandbox.Portal = (*Client)(nil)

// New returns a client of the portal at the other end of stream. It waits until the portal responds or ctx is done. The
// client takes over stream, and New closes stream if it returns an error.
func New(ctx context.Context, stream io.ReadWriteCloser) (*Client, error) {
	var dialed atomic.Bool
	dial := func(context.Context, string) (net.Conn, error) {
		if dialed.Swap(true) {
			return nil, errors.New("stream has ended")
		}
		return &streamConn{stream}, nil
	}
	conn, err := grpc.NewClient("passthrough:///portal",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(dial),
		// By default, gRPC closes a connection that is idle for half an hour. The stream could not be opened again.
		grpc.WithIdleTimeout(0),
		// The portal may still be starting. Only ctx bounds the wait for it.
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 24 * time.Hour}),
		grpc.WithInitialWindowSize(window),
		grpc.WithInitialConnWindowSize(window),
		grpc.WithDisableServiceConfig(),
	)
	if err != nil {
		stream.Close()
		return nil, fmt.Errorf("connect to the portal: %w", err)
	}
	c := &Client{conn: conn, rpc: portalv1.NewPortalServiceClient(conn)}
	if err := c.Ping(ctx); err != nil {
		conn.Close()
		stream.Close()
		return nil, fmt.Errorf("connect to the portal: %w", err)
	}
	return c, nil
}

// Close closes the connection, which ends the calls in progress.
func (c *Client) Close() error { return c.conn.Close() }

// Ping implements sandbox.Portal.
func (c *Client) Ping(ctx context.Context) error {
	if _, err := c.rpc.Ping(ctx, &portalv1.PingRequest{}); err != nil {
		return asError(ctx, err)
	}
	return nil
}

// RunCode implements sandbox.Portal. If code.Timeout is 0 or negative, the run has no time limit.
func (c *Client) RunCode(ctx context.Context, code sandbox.Code) (sandbox.Process, error) {
	languages := map[sandbox.Language]portalv1.RunCodeRequest_Language{
		sandbox.Python: portalv1.RunCodeRequest_LANGUAGE_PYTHON,
		sandbox.Node:   portalv1.RunCodeRequest_LANGUAGE_NODE,
	}
	return start(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[portalv1.RunCodeResponse], error) {
		return c.rpc.RunCode(ctx, &portalv1.RunCodeRequest{
			Language:    languages[code.Language],
			Code:        code.Text,
			Timeout:     timeout(code.Timeout),
			Environment: environment(code.Environment),
		})
	}, func(event *portalv1.RunCodeResponse) int {
		if event.GetResult().GetSuccess() {
			return 0
		}
		return 1
	})
}

// RunCommand implements sandbox.Portal. If command.Timeout is 0 or negative, the run has no time limit.
func (c *Client) RunCommand(ctx context.Context, command sandbox.Command) (sandbox.Process, error) {
	return start(ctx, func(ctx context.Context) (grpc.ServerStreamingClient[portalv1.RunCommandResponse], error) {
		return c.rpc.RunCommand(ctx, &portalv1.RunCommandRequest{
			Command:     command.Program,
			Args:        command.Args,
			Timeout:     timeout(command.Timeout),
			Environment: environment(command.Environment),
		})
	}, func(event *portalv1.RunCommandResponse) int { return int(event.GetResult().GetExitCode()) })
}

func timeout(d time.Duration) *durationpb.Duration {
	if d <= 0 {
		return nil
	}
	return durationpb.New(d)
}

func environment(e sandbox.Environment) *portalv1.Environment {
	return &portalv1.Environment{Env: e.Env, Workdir: e.Workdir}
}

// runTimeout is sandbox.ErrRunTimeout with the portal's message, which already says that the time limit was reached.
type runTimeout struct{ message string }

func (e runTimeout) Error() string { return e.message }
func (runTimeout) Unwrap() error   { return sandbox.ErrRunTimeout }

// asError translates err, a gRPC error, into the errors that sandbox.Portal promises. If ctx is done, asError returns
// the error of ctx.
func asError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	s := status.Convert(err)
	class := map[codes.Code]error{
		codes.InvalidArgument:    errdefs.ErrInvalidArgument,
		codes.FailedPrecondition: errdefs.ErrFailedPrecondition,
		codes.ResourceExhausted:  errdefs.ErrResourceExhausted,
		codes.NotFound:           sandbox.ErrCommandNotFound,
		codes.PermissionDenied:   sandbox.ErrCommandNotExecutable,
	}[s.Code()]
	switch {
	case class != nil:
		return fmt.Errorf("%s: %w", s.Message(), class)
	case s.Code() == codes.DeadlineExceeded:
		return runTimeout{s.Message()}
	case s.Code() == codes.Unavailable || s.Code() == codes.Canceled:
		return fmt.Errorf("connection to the sandbox is lost (%s): %w", s.Message(), errdefs.ErrUnavailable)
	}
	return err
}

// streamConn makes a stream a net.Conn, which gRPC needs. It ignores deadlines. gRPC does not need them, because it
// bounds calls by their contexts and closes the connection to end a blocked read.
type streamConn struct{ io.ReadWriteCloser }

type streamAddr struct{}

func (streamAddr) Network() string { return "stream" }
func (streamAddr) String() string  { return "portal" }

func (*streamConn) LocalAddr() net.Addr              { return streamAddr{} }
func (*streamConn) RemoteAddr() net.Addr             { return streamAddr{} }
func (*streamConn) SetDeadline(time.Time) error      { return nil }
func (*streamConn) SetReadDeadline(time.Time) error  { return nil }
func (*streamConn) SetWriteDeadline(time.Time) error { return nil }
