package client

import (
	"context"
	"errors"
	"io"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"

	"github.com/msbd/msbd/api/rpc"
)

// DialPort connects to a program that listens on a TCP port of the sandbox's loopback interface. If there is none, the error is
// errdefs.ErrNotFound. ctx is only for the connection setup. A deadline that is exceeded closes the connection.
func (s *Sandbox) DialPort(ctx context.Context, port int) (net.Conn, error) {
	conn, err := s.dialPort(ctx, port)
	if err != nil {
		return nil, err
	}
	return websocket.NetConn(context.Background(), conn, websocket.MessageBinary), nil
}

func (s *Sandbox) dialPort(ctx context.Context, port int) (*websocket.Conn, error) {
	return s.dial(ctx, strings.Replace(rpc.PortPath, "{port}", strconv.Itoa(port), 1), url.Values{}, func() {})
}

// Forward accepts connections from l and forwards each of them to a TCP port of the sandbox. It closes l and all connections
// when ctx is done, and then returns nil. failed is called with the error of a connection that could not be forwarded, or that
// broke off, unless it is nil. It may be called by several goroutines.
func (s *Sandbox) Forward(ctx context.Context, l net.Listener, port int, failed func(error)) error {
	ctx, cancel := context.WithCancel(ctx)
	var connections sync.WaitGroup
	defer connections.Wait()
	defer cancel()
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	report := func(err error) {
		if err != nil && ctx.Err() == nil && failed != nil {
			failed(err)
		}
	}
	for {
		local, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			report(err) // for example, too many files are open
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			continue
		}
		connections.Go(func() { report(s.forward(ctx, local, port)) })
	}
}

// lingering is how long a connection whose client has sent everything may be silent.
const lingering = 5 * time.Second

// forward forwards a connection until the program in the sandbox closes it, or until the client does. If it breaks off, or the
// program is silent for too long, the client's connection is reset, so that what it got does not look complete.
func (s *Sandbox) forward(ctx context.Context, local net.Conn, port int) (err error) {
	var silent atomic.Bool
	closeLocal := func() {
		if tcp, ok := local.(*net.TCPConn); ok && (err != nil || silent.Load()) {
			_ = tcp.SetLinger(0)
		}
		local.Close()
	}
	defer closeLocal()
	defer context.AfterFunc(ctx, func() { local.Close() })()
	remote, err := s.dialPort(ctx, port)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer remote.CloseNow()
	// The end of the client's data cannot be passed on alone. So the program may go on to answer until it is silent.
	var clientEnded, clientGone atomic.Bool
	silence := time.AfterFunc(lingering, func() {
		silent.Store(true)
		clientGone.Store(true)
		cancel()
	})
	silence.Stop()
	defer silence.Stop()
	var half sync.WaitGroup
	half.Go(func() {
		if _, err := io.Copy(messages{ctx, remote}, local); err != nil {
			clientGone.Store(true)
			cancel()
			return
		}
		clientEnded.Store(true)
		silence.Reset(lingering)
	})
	defer half.Wait()
	defer closeLocal()
	defer cancel()
	for {
		kind, data, err := remote.Read(ctx)
		switch {
		case err != nil && (clientGone.Load() || websocket.CloseStatus(err) == websocket.StatusNormalClosure):
			return nil
		case err != nil:
			return s.client.closed("the connection to port "+strconv.Itoa(port), err)
		case kind == websocket.MessageText:
			return frameError(data)
		}
		if clientEnded.Load() {
			silence.Reset(lingering)
		}
		if _, err := local.Write(data); err != nil {
			return nil // the client has gone
		}
	}
}

// messages is a writer that sends each piece as a message.
type messages struct {
	ctx  context.Context
	conn *websocket.Conn
}

func (m messages) Write(p []byte) (int, error) {
	if err := m.conn.Write(m.ctx, websocket.MessageBinary, p); err != nil {
		return 0, err
	}
	return len(p), nil
}
