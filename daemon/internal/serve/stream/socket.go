package stream

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/sync/errgroup"

	"github.com/msbd/msbd/api/rpc"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
)

const (
	// maxMessage limits a message of a client, in bytes.
	maxMessage = 1 << 20
	// pingInterval is the time between two pings, which keep proxies from closing a connection that is idle, and show
	// that the client still exists.
	pingInterval = 15 * time.Second
	// closeTimeout is how long the client may take to respond to the close of a WebSocket.
	closeTimeout = 5 * time.Second
	// These are opcodes of the protocol.
	opPing = 9
	opPong = 10
)

// socket is the server's end of a WebSocket.
//
// The library closes a connection without a close frame when the context of an operation ends. So the operations of a socket
// do not use the context of the request. The library also closes a connection on which it cannot write a ping, or the answer
// to one, within 5 seconds. This would cut off clients that read slowly, so the socket writes these itself.
type socket struct {
	conn *websocket.Conn
	raw  net.Conn // below conn
	call *gateway.Call
	// writing has an element while a frame other than a close frame is written.
	writing chan struct{}
	pings   chan []byte   // has the content of the client's last ping until that is answered
	pongs   chan struct{} // has an element if the client has answered a ping
	opened  time.Time
	// waiting is the age of the socket when the receiver began to wait for the client, or 0 if it does not wait.
	waiting atomic.Int64
}

// accept answers the handshake of a WebSocket.
func accept(c *gateway.Call, w http.ResponseWriter, r *http.Request) (*socket, error) {
	s := &socket{
		call: c, writing: make(chan struct{}, 1), pings: make(chan []byte, 1), pongs: make(chan struct{}, 1), opened: time.Now(),
	}
	var err error
	s.conn, err = websocket.Accept(hijacker{w, s}, r, &websocket.AcceptOptions{
		Subprotocols: []string{rpc.WebSocketProtocol},
		// Web pages of any site may connect, because they need an API key. In dev mode, which needs no key, the gateway
		// refuses the requests of all web pages.
		InsecureSkipVerify: true,
		OnPingReceived: func(_ context.Context, content []byte) bool {
			select {
			case <-s.pings: // the answer to a ping also answers those before it
			default:
			}
			s.pings <- bytes.Clone(content)
			return false
		},
		OnPongReceived: func(context.Context, []byte) {
			select {
			case s.pongs <- struct{}{}:
			default:
			}
		},
	})
	if err != nil {
		return nil, refuse(http.StatusBadRequest, "the WebSocket handshake is not valid; it needs the method GET and a Sec-WebSocket-Key of 16 bytes in base64")
	}
	s.conn.SetReadLimit(maxMessage)
	return s, nil
}

// hijacker is a ResponseWriter that keeps the connection that the library hijacks.
type hijacker struct {
	http.ResponseWriter
	socket *socket
}

func (h hijacker) Hijack() (conn net.Conn, rw *bufio.ReadWriter, err error) {
	conn, rw, err = http.NewResponseController(h.ResponseWriter).Hijack()
	h.socket.raw = conn
	return conn, rw, err
}

var (
	// errFinished means that everything was sent.
	errFinished = errors.New("finished")
	// errClientGone means that the client has closed the connection, or no longer responds.
	errClientGone = errors.New("the client has disconnected")
)

// mistake is an error of the client. status is for the close frame.
type mistake struct {
	status websocket.StatusCode
	err    *rpc.Error
}

func newMistake(status websocket.StatusCode, message string) error {
	return &mistake{status, &rpc.Error{Code: rpc.CodeInvalidRequest, Message: message}}
}

func (m *mistake) Error() string { return m.err.Message }
func (m *mistake) Unwrap() error { return m.err }

// serve passes each message of the client to receive, and runs the other functions, each in a goroutine. When the first of
// them returns an error, or ctx ends, it closes the connection and sends the client the reason. The functions must return
// when their context ends. serve returns the error, or nil for errFinished and errClientGone.
func (s *socket) serve(ctx context.Context, receive func(context.Context, websocket.MessageType, io.Reader) error, others ...func(context.Context) error) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, f := range append(others, s.ping, s.pong, func(ctx context.Context) error { return s.receiveAll(ctx, receive) }) {
		g.Go(func() (err error) {
			defer func() {
				if v := recover(); v != nil {
					err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
				}
			}()
			return f(ctx)
		})
	}
	<-ctx.Done()
	cause := context.Cause(ctx)
	s.close(cause)
	g.Wait()
	if cause == errFinished || cause == errClientGone {
		return nil
	}
	return cause
}

// close sends the client the reason for the end, and closes the connection.
func (s *socket) close(cause error) {
	// The library reads the rest of a message that the client has begun without a limit of time.
	defer time.AfterFunc(closeTimeout, func() { s.raw.Close() }).Stop()
	switch {
	case cause == errFinished:
		s.conn.Close(websocket.StatusNormalClosure, "")
	case cause == errClientGone:
		s.conn.CloseNow()
	case errors.Is(cause, rpcerr.ErrStopping):
		s.conn.Close(websocket.StatusGoingAway, "the server is stopping")
	case errdefs.IsUnauthorized(cause):
		s.conn.Close(websocket.StatusPolicyViolation, "the API key is no longer valid")
	default:
		status, rpcErr := websocket.StatusInternalError, rpcerr.JSONRPC(cause, s.call.ID)
		if m, ok := errors.AsType[*mistake](cause); ok {
			status = m.status
		} else if rpcerr.HTTPStatus(rpcErr.Code) < http.StatusInternalServerError {
			status = websocket.StatusPolicyViolation
		}
		s.writeJSON(struct {
			Error rpc.FrameError `json:"error"`
		}{rpc.FrameError{Code: rpcErr.Code, Message: rpcErr.Message}})
		s.conn.Close(status, "")
	}
}

// receiveAll passes each message of the client to receive, which reads it to its end. It returns the reason why there are no
// more, or the error of receive.
func (s *socket) receiveAll(ctx context.Context, receive func(context.Context, websocket.MessageType, io.Reader) error) error {
	for {
		s.beginWait()
		messageType, message, err := s.conn.Reader(context.Background())
		s.endWait()
		if err != nil {
			return receiveError(err)
		}
		if err := receive(ctx, messageType, receiving{s, message}); err != nil {
			return err
		}
	}
}

// receiving is a message that is being received.
type receiving struct {
	*socket
	message io.Reader
}

func (r receiving) Read(p []byte) (int, error) {
	r.beginWait()
	defer r.endWait()
	n, err := r.message.Read(p)
	if err != nil && err != io.EOF {
		err = receiveError(err)
	}
	return n, err
}

// receiveError returns the reason for an error of the library.
func receiveError(err error) error {
	if errors.Is(err, websocket.ErrMessageTooBig) {
		return newMistake(websocket.StatusMessageTooBig, fmt.Sprintf("a message has at most %d bytes", maxMessage))
	}
	return errClientGone
}

// age is in nanoseconds, and never 0.
func (s *socket) age() int64 { return 1 + int64(time.Since(s.opened)) }

func (s *socket) beginWait() { s.waiting.Store(s.age()) }
func (s *socket) endWait()   { s.waiting.Store(0) }

// ping sends pings. It returns errClientGone if the client does not answer one of them within the deadline, or has closed the
// connection. While the receiver does not read, because the sandbox does not, it cannot see an answer. ping then sends pongs,
// which need none: some clients cannot answer while they wait to send a message, and disconnect. After a client has closed the
// connection, the first or second of these frames cannot be written.
func (s *socket) ping(ctx context.Context) error {
	ticker := time.NewTicker(pingInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
		since := s.waiting.Load()
		if since == 0 {
			if err := s.writeControl(ctx, opPong, nil); err != nil {
				return err
			}
			continue
		}
		select {
		case <-s.pongs: // of an earlier ping
		default:
		}
		if err := s.writeControl(ctx, opPing, nil); err != nil {
			return err
		}
		select {
		case <-s.pongs:
		case <-time.After(gateway.AnswerDeadline):
			if s.waiting.Load() == since {
				return errClientGone
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// pong answers pings.
func (s *socket) pong(ctx context.Context) error {
	for {
		select {
		case content := <-s.pings:
			if err := s.writeControl(ctx, opPong, content); err != nil {
				return err
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// writeControl sends a ping or a pong, unless ctx has ended.
func (s *socket) writeControl(ctx context.Context, opcode byte, content []byte) error {
	s.writing <- struct{}{}
	defer func() { <-s.writing }()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	deadline := time.AfterFunc(gateway.AnswerDeadline, func() { s.raw.Close() })
	defer deadline.Stop()
	const final = 0x80 // the frame is complete
	if _, err := s.raw.Write(append([]byte{final | opcode, byte(len(content))}, content...)); err != nil {
		return errClientGone
	}
	return nil
}

// write sends a message. Several goroutines may call it.
func (s *socket) write(messageType websocket.MessageType, data []byte) error {
	s.writing <- struct{}{}
	defer func() { <-s.writing }()
	deadline, cancel := context.WithTimeout(context.Background(), gateway.AnswerDeadline)
	defer cancel()
	if s.conn.Write(deadline, messageType, data) != nil {
		return errClientGone
	}
	return nil
}

func (s *socket) writeJSON(value any) error {
	data, err := json.Marshal(value, jsontext.AllowInvalidUTF8(true))
	if err != nil {
		return err
	}
	return s.write(websocket.MessageText, data)
}
