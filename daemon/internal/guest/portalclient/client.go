// Package portalclient is msbd's client of the portal in a sandbox. It implements sandbox.Portal over a byte stream
// that the backend opens. Only package daemon imports this package.
package portalclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
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
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// Code in the sandbox can replace the portal, so msbd does not trust what it sends. These limits bound the memory that
// the other end of a connection can occupy. Everything else that it sends is counted by the reader of a process.
const (
	// window is the gRPC flow-control window of a run, in bytes. It is the output that a sandbox may send before msbd
	// reads it. A namespace may have many runs, so it is small.
	window = 128 << 10
	// connWindow is the window of a connection.
	connWindow = 1 << 20
	// maxMessage limits a message, in bytes. The portal's longest messages have 64 KiB of output.
	maxMessage = 128 << 10
	// maxHeaders limits the headers and trailers of a call, in bytes. Flow control does not apply to them. The portal's
	// longest trailers have an error that quotes a path.
	maxHeaders = 64 << 10
	// maxErrorText limits the text of the portal's errors, in bytes.
	maxErrorText = 2 << 10
)

// Client is a connection to one portal. It is safe for concurrent use. It does not reconnect. Once the stream has
// ended, every call returns errdefs.ErrUnavailable.
type Client struct {
	sandbox.Processes
	sandbox.Files
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
		grpc.WithInitialConnWindowSize(connWindow),
		grpc.WithMaxHeaderListSize(maxHeaders),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
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
		return connectionError(ctx, err)
	}
	return nil
}

// Dial implements sandbox.Portal.
func (c *Client) Dial(context.Context, sandbox.Address) (sandbox.Conn, error) { panic("no implementation yet") }

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

// classified is an error with the text of the portal, or of gRPC, and a class of the domain.
type classified struct {
	text  string
	class error
}

func (e classified) Error() string { return e.text }
func (e classified) Unwrap() error { return e.class }

// connectionError translates err, a gRPC error of a call that started no process. If ctx is done, it returns the cause.
func connectionError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	text := bounded.Text(status.Convert(err).Message(), maxErrorText)
	return classified{"the connection to the sandbox does not work (" + text + ")", errdefs.ErrUnavailable}
}

// runError translates err, the gRPC error at the end of a process, into the errors that sandbox.Process promises. The
// portal chooses its code and its text, so there is no code that makes a client send a run again, and the text is bounded.
// If ctx is done, runError returns the cause.
func runError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s := status.Convert(err)
	text := bounded.Text(s.Message(), maxErrorText)
	switch s.Code() {
	case codes.InvalidArgument:
		return classified{text, errdefs.ErrInvalidArgument}
	case codes.FailedPrecondition:
		return classified{text, errdefs.ErrFailedPrecondition}
	case codes.NotFound:
		// Programs that use the original's SDK look for these words. The portal of an older version may not send them.
		if !strings.Contains(text, "not found") {
			text += ": command not found"
		}
		return classified{text, sandbox.ErrCommandNotFound}
	case codes.PermissionDenied:
		return classified{text, sandbox.ErrCommandNotExecutable}
	case codes.DeadlineExceeded:
		return classified{text, sandbox.ErrRunTimeout}
	case codes.Unavailable, codes.Canceled:
		return classified{"the connection to the sandbox was lost during the run, for example because the program ended it. " +
			"The run may have taken effect: check before you repeat it", sandbox.ErrRunFailed}
	default:
		return classified{"the sandbox reported an error: " + text, sandbox.ErrRunFailed}
	}
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
