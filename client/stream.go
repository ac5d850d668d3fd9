package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
)

const (
	// maxSilence is how long a stream may be silent. The server sends something at least every 15 seconds.
	maxSilence = 90 * time.Second
	// maxEvent limits an event of a stream, in bytes. The longest are values that code shows, of up to 8 MiB.
	maxEvent = 64 << 20
)

// openStream makes a call that is answered with a stream of events. The caller must close the stream. Errors of the stream
// itself say that the call may have taken effect.
func openStream(ctx context.Context, c *Client, r request) (*events, error) {
	body, err := marshal(r)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	res, err := withRetries(ctx, r, func() (*http.Response, error) { return c.sendForEvents(ctx, body) })
	if err != nil {
		cancel(nil)
		return nil, err
	}
	e := &events{client: c, ctx: ctx, cancel: cancel, body: res.Body, method: r.method, requestID: res.Header.Get("X-Request-Id")}
	e.silence = time.AfterFunc(maxSilence, func() {
		cancel(errorf(context.DeadlineExceeded, "the server has sent nothing for %s", maxSilence))
	})
	e.lines = bufio.NewScanner(e)
	e.lines.Buffer(nil, maxEvent)
	return e, nil
}

// sendForEvents sends a request once. The response is a stream.
func (c *Client) sendForEvents(ctx context.Context, body []byte) (*http.Response, error) {
	req, err := c.newCall(ctx, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", rpc.EventStream)
	res, err := c.http().Do(req)
	if err != nil {
		return nil, c.explain(ctx, err)
	}
	if kind, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type")); res.StatusCode == http.StatusOK && kind == rpc.EventStream {
		return res, nil
	}
	r, err := c.readResponse(ctx, res)
	if err != nil {
		return nil, err
	}
	if _, err := r.result(); err != nil {
		return nil, err
	}
	return nil, r.unexpected()
}

// events is a stream of events.
type events struct {
	client    *Client
	ctx       context.Context
	cancel    context.CancelCauseFunc
	body      io.ReadCloser
	silence   *time.Timer
	lines     *bufio.Scanner
	method    string
	requestID string
}

// Read reads from the response. It is for lines.
func (e *events) Read(p []byte) (int, error) {
	e.silence.Reset(maxSilence)
	defer e.silence.Stop() // while the caller is busy
	return e.body.Read(p)
}

// Close ends the call if it is in progress.
func (e *events) Close() error {
	e.silence.Stop()
	e.cancel(nil)
	return e.body.Close()
}

// next returns the next event that is neither the result nor an error. At the end, it decodes the result and returns io.EOF.
// data is valid until the next call.
func (e *events) next(result any) (kind string, data []byte, err error) {
	for e.lines.Scan() {
		line := e.lines.Bytes()
		switch {
		case bytes.HasPrefix(line, []byte("event: ")):
			kind = string(line[len("event: "):])
			continue
		case !bytes.HasPrefix(line, []byte("data: ")): // the end of an event, or a comment
			continue
		}
		data = line[len("data: "):]
		switch kind {
		case rpc.EventResult:
			if err := json.Unmarshal(data, result); err != nil {
				return "", nil, errorf(errdefs.ErrUnknown, "decode the result of %s: %w", e.method, err)
			}
			return "", nil, io.EOF
		case rpc.EventError:
			var failure rpc.Error
			if err := json.Unmarshal(data, &failure); err != nil {
				return "", nil, errorf(errdefs.ErrUnknown, "decode the error of %s: %w", e.method, err)
			}
			r := response{status: http.StatusOK, header: http.Header{"X-Request-Id": {e.requestID}}}
			return "", nil, r.newError(&failure)
		}
		return kind, data, nil
	}
	if e.ctx.Err() != nil {
		return "", nil, contextError(e.ctx)
	}
	return "", nil, e.client.lost(e.method, e.lines.Err())
}

// decode decodes the data of an event.
func (e *events) decode(data []byte, into any) error {
	if err := json.Unmarshal(data, into); err != nil {
		return errorf(errdefs.ErrUnknown, "decode an event of %s: %w", e.method, err)
	}
	return nil
}

// lost returns the error for a connection that ended before the result of a call. cause may be nil.
func (c *Client) lost(method string, cause error) error {
	if cause == nil || errors.Is(cause, io.EOF) {
		cause = errors.New("closed by the other end")
	}
	return fmt.Errorf("%w: the connection to %s ended before the result of %s (%w): it may have taken effect",
		errdefs.ErrUnavailable, c.serverURL(), method, cause)
}
