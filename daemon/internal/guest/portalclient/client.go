// Package portalclient is msbd's end of the connection to the portal in a sandbox. It implements sandbox.Portal over
// any byte stream, which the backend opens. Only package daemon imports this package.
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

// window is how much output a sandbox may send ahead.
const window = 1 << 20

// Client is a connection to one portal, good for concurrent use. It does not reconnect: once the
// stream is lost, every call returns errdefs.ErrUnavailable.
type Client struct {
	conn *grpc.ClientConn
	rpc  portalv1.PortalServiceClient
}

var _ sandbox.Portal = (*Client)(nil)

// New greets the portal at the other end of stream, which the Client owns from now on; it is
// closed when New returns an error. The portal may take its time to answer: ctx bounds the wait.
func New(ctx context.Context, stream io.ReadWriteCloser) (*Client, error) {
	var dialed atomic.Bool
	dial := func(context.Context, string) (net.Conn, error) {
		if dialed.Swap(true) {
			return nil, errors.New("the stream has ended")
		}
		return &streamConn{stream}, nil
	}
	conn, err := grpc.NewClient("passthrough:///portal",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(dial),
		// The default closes an idle connection after half an hour; this one cannot be opened again.
		grpc.WithIdleTimeout(0),
		// The portal's side may still be starting: how long to wait for it is up to ctx.
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

// Close ends the connection and with it the calls in progress.
func (c *Client) Close() error { return c.conn.Close() }

// Ping implements sandbox.Portal.
func (c *Client) Ping(ctx context.Context) error {
	if _, err := c.rpc.Ping(ctx, &portalv1.PingRequest{}); err != nil {
		return asError(ctx, err)
	}
	return nil
}

// RunCode implements sandbox.Portal. No Timeout means no limit.
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

// RunCommand implements sandbox.Portal. No Timeout means no limit.
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

// asError gives a call's error the class that the domain knows.
func asError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	s := status.Convert(err)
	class := map[codes.Code]error{
		codes.InvalidArgument:    errdefs.ErrInvalidArgument,
		codes.FailedPrecondition: errdefs.ErrFailedPrecondition,
		codes.ResourceExhausted:  errdefs.ErrResourceExhausted,
		codes.DeadlineExceeded:   sandbox.ErrRunTimeout,
		codes.NotFound:           sandbox.ErrCommandNotFound,
	}[s.Code()]
	switch {
	case class != nil:
		return fmt.Errorf("%s: %w", s.Message(), class)
	case s.Code() == codes.Unavailable || s.Code() == codes.Canceled:
		return fmt.Errorf("connection to the sandbox is lost (%s): %w", s.Message(), errdefs.ErrUnavailable)
	}
	return err
}

// streamConn lets gRPC speak over a plain stream. It has no deadlines: gRPC bounds calls by their
// contexts and ends a stuck read by closing.
type streamConn struct{ io.ReadWriteCloser }

type streamAddr struct{}

func (streamAddr) Network() string { return "stream" }
func (streamAddr) String() string  { return "portal" }

func (*streamConn) LocalAddr() net.Addr              { return streamAddr{} }
func (*streamConn) RemoteAddr() net.Addr             { return streamAddr{} }
func (*streamConn) SetDeadline(time.Time) error      { return nil }
func (*streamConn) SetReadDeadline(time.Time) error  { return nil }
func (*streamConn) SetWriteDeadline(time.Time) error { return nil }
