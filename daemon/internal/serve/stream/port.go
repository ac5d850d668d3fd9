package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"github.com/coder/websocket"
	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// port connects a WebSocket to a TCP port on the loopback interface of a sandbox.
func (s *service) port(c *gateway.Call, w http.ResponseWriter, r *http.Request) error {
	name, _, err := target(c, r)
	if err != nil {
		return err
	}
	port, err := strconv.ParseUint(r.PathValue("port"), 10, 16)
	if err != nil || port == 0 {
		return fmt.Errorf("port %q: give a number from 1 to 65535: %w", bounded.Short(r.PathValue("port")), errdefs.ErrInvalidArgument)
	}
	var conn sandbox.Conn
	c.Wait(func() { conn, err = s.sandboxes.Dial(r.Context(), name, sandbox.Address{Port: uint16(port)}) })
	if err != nil {
		return err
	}
	defer conn.Close()
	socket, err := accept(c, w, r)
	if err != nil {
		return err
	}
	program := &program{Conn: conn}
	var received, sent [32 << 10]byte
	receive := func(_ context.Context, messageType websocket.MessageType, message io.Reader) error {
		if messageType != websocket.MessageBinary {
			return newMistake(websocket.StatusUnsupportedData, "send binary frames; this WebSocket is a connection to a program")
		}
		_, err := io.CopyBuffer(program, message, received[:])
		return err
	}
	send := func(ctx context.Context) error {
		for {
			n, err := conn.Read(sent[:])
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if n > 0 {
				if err := socket.write(websocket.MessageBinary, sent[:n]); err != nil {
					return err
				}
			}
			if err == io.EOF {
				return errFinished
			}
			if errors.Is(err, sandbox.ErrRunFailed) { // it says why
				return err
			}
			if err != nil {
				return fmt.Errorf("the connection to port %d was lost: %w", port, sandbox.ErrRunFailed)
			}
		}
	}
	closeConn := func(ctx context.Context) error {
		<-ctx.Done()
		conn.Close() // ends a Read or Write
		return nil
	}
	return socket.serve(r.Context(), receive, send, closeConn)
}

// program is the end of a connection to which the client's data goes. Once the program does not accept any more, the rest is
// discarded, because what the program sends also says how the connection ends.
type program struct {
	sandbox.Conn
	closed bool
}

func (p *program) Write(data []byte) (int, error) {
	if !p.closed {
		_, err := p.Conn.Write(data)
		p.closed = err != nil
	}
	return len(data), nil
}
