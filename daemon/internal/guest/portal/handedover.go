package portal

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// agentFD is the descriptor at which msbd's guest agent gives the portal the socket over which it hands over connections, if
// msbd reaches this guest over the network.
const agentFD = 5

// openAgentSocket returns the agent's socket, or nil if the agent has provided none. It closes agentFD.
func openAgentSocket() (*net.UnixConn, error) {
	kind, err := unix.GetsockoptInt(agentFD, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kind != unix.SOCK_SEQPACKET {
		return nil, nil
	}
	file := os.NewFile(agentFD, "agent")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}

// handedOver are the connections that the guest's agent hands over. Each comes in a message: a NUL byte and the id of the
// transfer that it is for, which may be empty, with the descriptor of a TCP socket. The agent has checked that it is msbd's.
type handedOver struct {
	agent *net.UnixConn
	ready bool // the agent knows that the portal takes connections
}

func (h *handedOver) accept() (incoming, error) {
	if !h.ready {
		if _, err := h.agent.Write([]byte{0}); err != nil {
			return nil, fmt.Errorf("tell the agent that the portal takes connections: %w", err)
		}
		h.ready = true
	}
	for {
		data, rights := make([]byte, 1+transferID), make([]byte, unix.CmsgSpace(4))
		length, n, _, _, err := h.agent.ReadMsgUnix(data, rights)
		if err == nil && length == 0 {
			err = io.EOF
		}
		if err != nil {
			return nil, fmt.Errorf("receive a connection from the agent: %w", err)
		}
		conn, err := receiveTCP(rights[:n])
		if err != nil {
			continue // for example, there are too many open files; msbd finds the connection closed
		}
		return &direct{conn, string(data[1:length])}, nil
	}
}

func (h *handedOver) Addr() net.Addr { return h.agent.LocalAddr() }
func (h *handedOver) Close() error   { return h.agent.Close() }

// receiveTCP returns the TCP connection in the control messages of a message.
func receiveTCP(rights []byte) (*net.TCPConn, error) {
	fds, err := receivedDescriptors(rights)
	if err != nil {
		return nil, err
	}
	if len(fds) != 1 {
		closeDescriptors(fds)
		return nil, fmt.Errorf("the agent sent %d descriptors", len(fds))
	}
	file := os.NewFile(uintptr(fds[0]), "connection")
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		conn.Close()
		return nil, errors.New("the agent sent another descriptor than that of a TCP connection")
	}
	_ = tcp.SetNoDelay(true)
	return tcp, nil
}

// receivedDescriptors returns the descriptors in the control messages of a message.
func receivedDescriptors(rights []byte) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(rights)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		received, err := unix.ParseUnixRights(&m)
		if err != nil {
			closeDescriptors(fds)
			return nil, err
		}
		fds = append(fds, received...)
	}
	return fds, nil
}

func closeDescriptors(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// direct is a TCP connection of msbd.
type direct struct {
	*net.TCPConn
	transfer string
}

func (d *direct) transferID() string { return d.transfer }

func (d *direct) move(f *os.File, offset, length int64) error {
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return err
	}
	n, err := d.ReadFrom(io.LimitReader(f, length)) // in the kernel, if the file system supports that
	switch {
	case errors.Is(err, net.ErrClosed), errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
		return errTransferEnded
	case err == nil && n < length:
		return io.ErrUnexpectedEOF
	}
	return err
}
