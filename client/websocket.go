package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/coder/websocket"
	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
)

// libraryBody is how much the WebSocket library keeps of the body of a response that is an error, in bytes.
const libraryBody = 1024

// maxFrame limits a message of the server, in bytes. Its longest have 64 KiB of output.
const maxFrame = 1 << 20

// path returns the path of a sandbox's files or of one of its WebSockets, with the query that names its namespace. pattern is
// one of the paths in package rpc.
func (s *Sandbox) path(pattern string, query url.Values) (path string, _ url.Values, err error) {
	// In a path, a name such as ".." would lead elsewhere. The server accepts fewer names.
	if s.Name == "" || strings.Trim(s.Name, ".") == "" {
		return "", nil, errorf(errdefs.ErrInvalidArgument, "%q is not the name of a sandbox", s.Name)
	}
	if s.Namespace != "" {
		query.Set("namespace", s.Namespace)
	}
	return strings.Replace(pattern, "{name}", url.PathEscape(s.Name), 1), query, nil
}

// dial opens a WebSocket of the sandbox. Its context is only for the handshake. alive is called when the server shows that it is
// alive, which it does at least every 15 seconds.
func (s *Sandbox) dial(ctx context.Context, pattern string, query url.Values, alive func()) (*websocket.Conn, error) {
	c := s.client
	path, query, err := s.path(pattern, query)
	if err != nil {
		return nil, err
	}
	req, err := c.newRequest(ctx, http.MethodGet, path, nil)
	if err == nil {
		err = c.authorize(req)
	}
	if err != nil {
		return nil, err
	}
	req.URL.RawQuery = query.Encode()
	return withRetries(ctx, request{}, func() (*websocket.Conn, error) {
		conn, res, err := websocket.Dial(ctx, req.URL.String(), &websocket.DialOptions{
			HTTPClient: c.http(), HTTPHeader: req.Header, Subprotocols: []string{rpc.WebSocketProtocol},
			OnPingReceived: func(context.Context, []byte) bool { alive(); return true },
			OnPongReceived: func(context.Context, []byte) { alive() },
		})
		if err == nil {
			conn.SetReadLimit(maxFrame)
			return conn, nil
		}
		if res == nil || res.StatusCode == http.StatusSwitchingProtocols {
			return nil, c.explain(ctx, err)
		}
		body, _ := io.ReadAll(res.Body)
		r := &response{status: res.StatusCode, header: res.Header, body: body}
		if len(body) >= libraryBody && res.Header.Get("X-Request-Id") != "" {
			return nil, r.newError(&rpc.Error{Message: fmt.Sprintf("the server has refused the request (HTTP status %d)", r.status)})
		}
		if _, err := r.result(); err != nil {
			return nil, err
		}
		return nil, r.unexpected()
	})
}

// frameError returns the error in a text frame {"error":…}, or nil if the frame is another one.
func frameError(frame []byte) error {
	if !bytes.Contains(frame, []byte(`"error"`)) {
		return nil
	}
	var f struct {
		Error *rpc.FrameError `json:"error"`
	}
	if json.Unmarshal(frame, &f) != nil || f.Error == nil {
		return nil
	}
	return &Error{Code: f.Error.Code, Message: f.Error.Message}
}

// closed returns the error for a WebSocket that ended before everything was received.
func (c *Client) closed(what string, err error) error {
	if e, ok := errors.AsType[websocket.CloseError](err); ok {
		switch e.Code {
		case websocket.StatusGoingAway:
			return errorf(errdefs.ErrUnavailable, "the server at %s stopped during %s", c.serverURL(), what)
		case websocket.StatusPolicyViolation:
			return errorf(errdefs.ErrUnauthenticated, "the server ended %s: %s", what, e.Reason)
		}
		err = fmt.Errorf("closed with code %d", e.Code)
	}
	return c.lost(what, err)
}
