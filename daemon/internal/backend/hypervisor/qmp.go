package hypervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A monitor is a connection to QEMU's QMP socket. Only one command may run at a time.
type monitor struct {
	conn   *net.UnixConn
	decode *json.Decoder
	// migration is the last status that QEMU has reported of saving or restoring the VM.
	migration string
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
		ID     string `json:"id"`
		Open   bool   `json:"open"`
		Status string `json:"status"`
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
	m := &monitor{conn: conn.(*net.UnixConn), decode: json.NewDecoder(conn)}
	if _, err := m.next(); err != nil { // the greeting
		conn.Close()
		return nil, err
	}
	if err := m.execute("qmp_capabilities", nil, nil); err != nil {
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
	if err := m.execute("query-chardev", nil, &chardevs); err != nil {
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

// execute runs a command, with arguments unless they are nil, and decodes its result into result, unless that is nil. It
// discards events that arrive meanwhile, except for those about a migration.
func (m *monitor) execute(command string, arguments map[string]any, result any) error {
	return m.executeWith(nil, command, arguments, result)
}

// executeWith is like execute. It also gives QEMU a descriptor of file, unless that is nil.
func (m *monitor) executeWith(file *os.File, command string, arguments map[string]any, result any) error {
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	data, err := json.Marshal(request)
	if err != nil {
		return err
	}
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	if _, _, err := m.conn.WriteMsgUnix(data, rights, nil); err != nil {
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
	if msg.Event == "MIGRATION" {
		m.migration = msg.Data.Status
	}
	return msg, nil
}

// prepareMigration makes a migration leave out the memory, which is in a file.
func (m *monitor) prepareMigration() error {
	enabled := func(name string) any { return map[string]any{"capability": name, "state": true} }
	return m.execute("migrate-set-capabilities", map[string]any{"capabilities": []any{enabled("x-ignore-shared"), enabled("events")}}, nil)
}

// save stops the VM and writes its state, without its memory, to file.
func (m *monitor) save(file *os.File) error {
	if err := m.prepareMigration(); err != nil {
		return err
	}
	// Saving takes no descriptor that QEMU has inherited.
	const name = "state"
	if err := m.executeWith(file, "getfd", map[string]any{"fdname": name}, nil); err != nil {
		return err
	}
	if err := m.execute("migrate", map[string]any{"uri": "fd:" + name}, nil); err != nil {
		return err
	}
	return m.waitMigrated()
}

// restore reads the state of the VM from QEMU's descriptor fd, and lets the VM continue. QEMU must have been started with
// -incoming defer.
func (m *monitor) restore(fd int) error {
	if err := m.prepareMigration(); err != nil {
		return err
	}
	if err := m.execute("migrate-incoming", map[string]any{"uri": fmt.Sprintf("fd:%d", fd)}, nil); err != nil {
		return err
	}
	if err := m.waitMigrated(); err != nil {
		return err
	}
	return m.execute("cont", nil, nil) // does nothing if the VM runs
}

// waitMigrated waits until QEMU has saved or restored the VM.
func (m *monitor) waitMigrated() error {
	for m.migration != "completed" {
		if m.migration == "failed" {
			return errors.New("QEMU could not save or restore the state of the VM")
		}
		if _, err := m.next(); err != nil {
			return err
		}
	}
	return nil
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
