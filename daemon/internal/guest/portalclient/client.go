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
	window = 256 << 10
	// connWindow is the window of a connection.
	connWindow = 1 << 20
	// bufferSize is the size of the buffers between gRPC and the connection, in bytes. A connection always has the one for
	// reading, and the other one only while it writes.
	bufferSize = 128 << 10
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
	conn      *grpc.ClientConn
	runs      portalv1.PortalServiceClient
	processes portalv1.ProcessServiceClient
	files     portalv1.FileServiceClient
	attach    sandbox.Attach
	transfers chan struct{} // has an element for each transfer, at most maxTransfers
	closed    context.Context
	close     context.CancelFunc
	// contract is the version of the contract that the portal serves, as in PingResponse. It is set by the first ping.
	contract atomic.Uint32
}

var _ sandbox.Portal = (*Client)(nil)

// New returns a client of the portal at the other end of stream. It waits until the portal responds or ctx is done. The
// client takes over stream, and New closes stream if it returns an error. The client opens transfers with attach.
func New(ctx context.Context, stream io.ReadWriteCloser, attach sandbox.Attach) (*Client, error) {
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
		grpc.WithReadBufferSize(bufferSize),
		grpc.WithWriteBufferSize(bufferSize),
		grpc.WithMaxHeaderListSize(maxHeaders),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithDisableServiceConfig(),
	)
	if err != nil {
		stream.Close()
		return nil, fmt.Errorf("connect to the portal: %w", err)
	}
	c := &Client{
		conn: conn, runs: portalv1.NewPortalServiceClient(conn), processes: portalv1.NewProcessServiceClient(conn), files: portalv1.NewFileServiceClient(conn),
		attach: attach, transfers: make(chan struct{}, maxTransfers),
	}
	c.closed, c.close = context.WithCancel(context.Background())
	if err := c.Ping(ctx); err != nil {
		c.Close()
		stream.Close()
		return nil, fmt.Errorf("connect to the portal: %w", err)
	}
	return c, nil
}

// Close closes the connection, which ends the calls in progress.
func (c *Client) Close() error {
	c.close()
	return c.conn.Close()
}

// Ping implements sandbox.Portal.
func (c *Client) Ping(ctx context.Context) error {
	res, err := c.runs.Ping(ctx, &portalv1.PingRequest{})
	if err != nil {
		return connectionError(ctx, err)
	}
	c.contract.Store(res.GetContract())
	return nil
}

// These are versions of the contract, by what they added.
const (
	processes = 1 // processes, files, and the options of runs
	contexts  = 2 // contexts, results and bash
	interrupt = 3 // the interrupt of a run that goes on
	warm      = 4 // interpreters that are started in advance
	rehearsal = 5 // runs that leave nothing behind
	uploads   = 6 // transfers to the sandbox
)

// checkContract returns errdefs.ErrFailedPrecondition unless the portal serves a version of the contract. Sandboxes that an
// earlier version of msbd started have its portal.
func (c *Client) checkContract(version uint32) error {
	if c.contract.Load() >= version {
		return nil
	}
	return fmt.Errorf("the sandbox was started by an earlier version of msbd, which did not have this. Stop it and start it again: %w",
		errdefs.ErrFailedPrecondition)
}

func duration(d time.Duration) *durationpb.Duration {
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

// connectionError translates err, a gRPC error of a call of which nothing was sent. If ctx is done, it returns the cause.
func connectionError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	text := bounded.Text(status.Convert(err).Message(), maxErrorText)
	return classified{"the connection to the sandbox does not work (" + text + ")", errdefs.ErrUnavailable}
}

// callError translates err, the gRPC error at the end of a call, into the errors that sandbox.Portal promises. The portal
// chooses its code and its text, so there is no code that makes a client repeat a call, and the text is bounded. If ctx is
// done, callError returns the cause.
func callError(ctx context.Context, err error) error {
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
		return classified{text, errdefs.ErrNotFound}
	case codes.AlreadyExists:
		return classified{text, errdefs.ErrAlreadyExists}
	case codes.ResourceExhausted:
		if strings.Contains(text, "no space left") {
			return classified{text, sandbox.ErrSandboxFull}
		}
		return classified{text, errdefs.ErrFailedPrecondition}
	case codes.DeadlineExceeded:
		return classified{text, sandbox.ErrRunTimeout}
	case codes.Unavailable, codes.Canceled:
		return classified{"the connection to the sandbox was lost, for example because a program in it ended the connection. " +
			"The request may have taken effect: check before you repeat it", sandbox.ErrRunFailed}
	default:
		return classified{"the sandbox reported an error: " + text, sandbox.ErrRunFailed}
	}
}

// startError is callError for a call that starts a program.
func startError(ctx context.Context, err error) error {
	s := status.Convert(err)
	switch {
	case ctx.Err() != nil:
	case s.Code() == codes.NotFound:
		text := bounded.Text(s.Message(), maxErrorText)
		// Programs that use the original's SDK look for these words. The portal of an older version may not send them.
		if !strings.Contains(text, "not found") {
			text += ": command not found"
		}
		return classified{text, sandbox.ErrCommandNotFound}
	case s.Code() == codes.PermissionDenied:
		return classified{bounded.Text(s.Message(), maxErrorText), sandbox.ErrCommandNotExecutable}
	}
	return callError(ctx, err)
}

// call makes a call with one request and one response. version is that of the contract that has the method.
func call[Response any](ctx context.Context, c *Client, version uint32, method string, req any) (*Response, error) {
	if err := c.checkContract(version); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.conn.NewStream(ctx, &grpc.StreamDesc{}, method)
	if err != nil {
		return nil, connectionError(ctx, err)
	}
	res := new(Response)
	// If a send fails, the reason is the error of the receive.
	if stream.SendMsg(req) == nil {
		_ = stream.CloseSend()
	}
	if err := stream.RecvMsg(res); err != nil {
		return nil, callError(ctx, err)
	}
	return res, nil
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
