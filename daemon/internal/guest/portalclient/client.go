// Package portalclient is msbd's end of a connection to the portal in a sandbox. It satisfies
// sandbox.Portal over any byte stream; who opens the stream, and how, is microvm's business.
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

// RunCode implements sandbox.Portal. No Timeout means no limit. More than MaxOutput is
// sandbox.ErrOutputLimit.
func (c *Client) RunCode(ctx context.Context, run sandbox.CodeRun) (sandbox.CodeResult, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	languages := map[sandbox.Language]portalv1.RunCodeRequest_Language{
		sandbox.Python: portalv1.RunCodeRequest_LANGUAGE_PYTHON,
		sandbox.Node:   portalv1.RunCodeRequest_LANGUAGE_NODE,
	}
	stream, err := c.rpc.RunCode(ctx, &portalv1.RunCodeRequest{
		Language:    languages[run.Language],
		Code:        run.Code,
		Timeout:     timeout(run.Timeout),
		Environment: &portalv1.Environment{Env: run.Env, Workdir: run.Workdir},
	})
	if err != nil {
		return sandbox.CodeResult{}, asError(ctx, err)
	}
	result, output, err := collect(ctx, stream, run.Keep)
	if err != nil {
		return sandbox.CodeResult{}, err
	}
	return sandbox.CodeResult{Success: result.GetResult().GetSuccess(), Output: output}, nil
}

// RunCommand implements sandbox.Portal. No Timeout means no limit. More than MaxOutput is
// sandbox.ErrOutputLimit.
func (c *Client) RunCommand(ctx context.Context, run sandbox.CommandRun) (sandbox.CommandResult, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.rpc.RunCommand(ctx, &portalv1.RunCommandRequest{
		Command:     run.Command,
		Args:        run.Args,
		Timeout:     timeout(run.Timeout),
		Environment: &portalv1.Environment{Env: run.Env, Workdir: run.Workdir},
	})
	if err != nil {
		return sandbox.CommandResult{}, asError(ctx, err)
	}
	result, output, err := collect(ctx, stream, run.Keep)
	if err != nil {
		return sandbox.CommandResult{}, err
	}
	return sandbox.CommandResult{ExitCode: int(result.GetResult().GetExitCode()), Output: output}, nil
}

func timeout(d time.Duration) *durationpb.Duration {
	if d <= 0 {
		return nil
	}
	return durationpb.New(d)
}

// collect reads a run's events to the last, which is its result. Leaving early is left to the
// caller's cancelling the stream's context.
func collect[E any, R interface {
	*E
	GetOutput() *portalv1.Output
}](ctx context.Context, stream grpc.ServerStreamingClient[E], keep func(bytes int) error) (result R, output []sandbox.Line, err error) {
	lines := lines{keep: keep}
	for {
		event, err := stream.Recv()
		if err == io.EOF {
			if result == nil {
				return nil, nil, fmt.Errorf("read the run's result: %w", errdefs.ErrUnavailable)
			}
			return result, lines.end(), nil
		}
		if err != nil {
			return nil, nil, asError(ctx, err)
		}
		out := R(event).GetOutput()
		if out == nil {
			result = event
			continue
		}
		if err := lines.add(out); err != nil {
			return nil, nil, err
		}
	}
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
