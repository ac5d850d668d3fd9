package portalclient

import (
	"context"
	"io"

	"google.golang.org/grpc"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// pieceSize is the length of the pieces in which data is sent to a sandbox, in bytes.
const pieceSize = 64 << 10

// send makes a call that sends first, then data in pieces, then what last sends, and returns the response. If data fails, send
// cancels the call and returns that error. If transfer is not empty, first has requested the transfer with this id, and the data
// goes over it if it opens.
func send[Request, Response any](ctx context.Context, c *Client,
	open func(context.Context, ...grpc.CallOption) (grpc.ClientStreamingClient[Request, Response], error),
	data io.Reader, first *Request, transfer string, piece func([]byte) *Request, last func(grpc.ClientStreamingClient[Request, Response]),
) (*Response, error) {
	if err := c.checkContract(processes); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := open(ctx)
	if err != nil {
		return nil, connectionError(ctx, err)
	}
	// If a send fails, the reason is the error of CloseAndRecv.
	if err := stream.Send(first); err == nil {
		write := func(data []byte) error { return stream.Send(piece(data)) }
		if transfer != "" {
			if upload := c.openUpload(stream, transfer); upload != nil {
				defer upload.Close()
				write = func(data []byte) error { _, err := upload.Write(data); return err }
			}
		}
		buf := make([]byte, pieceSize)
		for err == nil {
			var n int
			n, err = data.Read(buf)
			if n > 0 && write(buf[:n]) != nil {
				break
			}
		}
		if err != nil && err != io.EOF {
			return nil, err
		}
		if err == io.EOF && last != nil {
			last(stream)
		}
	}
	response, err := stream.CloseAndRecv()
	if err != nil {
		return nil, callError(ctx, err)
	}
	return response, nil
}

// responses are the responses of a call with one request.
type responses[Response any] struct {
	grpc.ServerStreamingClient[Response]
	ctx    context.Context
	cancel context.CancelFunc
}

// receive makes a call with one request and a stream of responses. The caller must cancel it.
func receive[Request, Response any](ctx context.Context, c *Client,
	open func(context.Context, *Request, ...grpc.CallOption) (grpc.ServerStreamingClient[Response], error), req *Request,
) (*responses[Response], error) {
	if err := c.checkContract(processes); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := open(ctx, req)
	if err != nil {
		err = connectionError(ctx, err)
		cancel()
		return nil, err
	}
	return &responses[Response]{stream, ctx, cancel}, nil
}

// first returns the first response. If there is none, it cancels the call.
func (r *responses[Response]) first() (*Response, error) {
	res, err := r.Recv()
	if err == nil {
		return res, nil
	}
	if err == io.EOF {
		err = classified{"the sandbox ended the call without a response", sandbox.ErrRunFailed}
	} else {
		err = callError(r.ctx, err)
	}
	r.cancel()
	return nil, err
}

// reader returns the data of the responses that follow.
func (r *responses[Response]) reader(data func(*Response) []byte) *receiver {
	return &receiver{ctx: r.ctx, cancel: r.cancel, next: func() ([]byte, error) {
		res, err := r.Recv()
		if err != nil {
			return nil, err
		}
		return data(res), nil
	}}
}

// receiver is the data of a stream. It implements io.ReadCloser.
type receiver struct {
	ctx    context.Context
	cancel context.CancelFunc
	// next returns the next piece of data, or io.EOF.
	next func() ([]byte, error)
	data []byte
	err  error
}

// Read implements io.Reader.
func (r *receiver) Read(p []byte) (int, error) {
	for len(r.data) == 0 {
		if r.err != nil {
			return 0, r.err
		}
		if r.data, r.err = r.next(); r.err != nil && r.err != io.EOF {
			r.err = callError(r.ctx, r.err)
		}
	}
	n := copy(p, r.data)
	r.data = r.data[n:]
	return n, nil
}

// Close implements io.Closer. It ends the call.
func (r *receiver) Close() error {
	r.cancel()
	return nil
}
