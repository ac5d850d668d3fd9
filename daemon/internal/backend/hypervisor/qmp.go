package hypervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// A monitor is a connection to QEMU's QMP socket. Only one command may run at a time.
type monitor struct {
	conn   net.Conn
	decode *json.Decoder
}

// A message is any message from QEMU. The fields that are set show its kind.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Description string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	Data  struct {
		ID   string `json:"id"`
		Open bool   `json:"open"`
	} `json:"data"`
}

// dialMonitor connects to QEMU and negotiates QMP's capabilities. All later calls on the monitor also end when ctx
// ends.
func dialMonitor(ctx context.Context, socket string) (*monitor, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("connect to QEMU: %w", err)
	}
	context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	m := &monitor{conn: conn, decode: json.NewDecoder(conn)}
	if _, err := m.next(); err != nil { // the greeting
		conn.Close()
		return nil, err
	}
	if err := m.execute("qmp_capabilities", nil); err != nil {
		conn.Close()
		return nil, err
	}
	return m, nil
}

func (m *monitor) close() { _ = m.conn.Close() }

// waitOpen blocks until the guest has opened the virtio-serial port.
func (m *monitor) waitOpen(port string) error {
	// Query the state first, because there is no event if the port was opened before the negotiation.
	var chardevs []struct {
		Label string `json:"label"`
		Open  bool   `json:"frontend-open"`
	}
	if err := m.execute("query-chardev", &chardevs); err != nil {
		return err
	}
	for _, c := range chardevs {
		if c.Label == port && c.Open {
			return nil
		}
	}
	for {
		msg, err := m.next()
		if err != nil {
			return err
		}
		switch {
		case msg.Event == "VSERPORT_CHANGE" && msg.Data.ID == port && msg.Data.Open:
			return nil
		case msg.Event == "SHUTDOWN":
			return errors.New("the guest shut down before its agent was ready")
		}
	}
}

// execute runs a command and decodes its result into result, unless that is nil. It discards events that arrive
// meanwhile.
func (m *monitor) execute(command string, result any) error {
	if err := json.NewEncoder(m.conn).Encode(map[string]string{"execute": command}); err != nil {
		return fmt.Errorf("send QEMU the command %s: %w", command, connError(err))
	}
	for {
		msg, err := m.next()
		switch {
		case err != nil:
			return err
		case msg.Error != nil:
			return fmt.Errorf("QEMU rejected the command %s: %s", command, msg.Error.Description)
		case msg.Return != nil && result == nil:
			return nil
		case msg.Return != nil:
			return json.Unmarshal(msg.Return, result)
		}
	}
}

func (m *monitor) next() (message, error) {
	var msg message
	if err := m.decode.Decode(&msg); err != nil {
		return msg, fmt.Errorf("read from QEMU: %w", connError(err))
	}
	return msg, nil
}

// connError says it if err means that QEMU closed the connection, which it does only when it exits.
func connError(err error) error {
	for _, closed := range []error{io.EOF, io.ErrUnexpectedEOF, unix.ECONNRESET, unix.EPIPE} {
		if errors.Is(err, closed) {
			return errors.New("QEMU exited")
		}
	}
	return err
}
