package portal

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	processes "github.com/msbd/msbd/daemon/internal/sys/process"
)

// incoming is a connection of msbd.
type incoming interface {
	net.Conn
	// transferID returns the id of the transfer that the connection is for. It is empty for a connection over which msbd makes
	// calls.
	transferID() string
	// move sends length bytes of f, from offset on. If f has fewer, it returns io.ErrUnexpectedEOF. If the other end has ended
	// the connection, it returns errTransferEnded.
	move(f *os.File, offset, length int64) error
}

// connections are the connections of msbd. No other process can make one.
type connections interface {
	// accept waits for the next connection. It returns an error when there will be none.
	accept() (incoming, error)
	Addr() net.Addr
	Close() error
}

// listener is a listener for the connections over which msbd makes calls. It closes the previous one when it accepts a new one,
// because if a daemon is killed, its connection may stay open. That of the next daemon then replaces it. Only one goroutine
// may call Accept.
type listener struct {
	connections
	transfers *transfers // get the connections that are for a transfer
	last      incoming
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		conn, err := l.accept()
		if err != nil {
			return nil, err
		}
		if conn.transferID() != "" {
			l.transfers.begin(conn)
			continue
		}
		if l.last != nil {
			l.last.Close()
		}
		l.last = conn
		return conn, nil
	}
}

// bridges are the bridges (Connect) that msbd has started, and that have connected to a Unix socket.
type bridges struct{ net.Listener }

func (b bridges) accept() (incoming, error) {
	for {
		conn, err := b.Accept()
		if err != nil {
			return nil, err
		}
		bridge := conn.(*net.UnixConn)
		var p *pipes
		if err = checkBridge(bridge); err == nil {
			p, err = receivePipes(bridge)
		}
		if err != nil {
			bridge.Close()
			continue
		}
		return p, nil
	}
}

// checkBridge returns an error unless msbd has started the process at the other end of conn. All processes of the
// sandbox are descendants of the portal, because it is the reaper of their orphans. A bridge is not, because the
// guest's agent starts it from outside of the container. The bridge is root, or the user of the portal.
func checkBridge(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	var peerErr error
	if err := raw.Control(func(fd uintptr) { peer, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if peerErr != nil {
		return os.NewSyscallError("getsockopt", peerErr)
	}
	if peer.Uid != 0 && int(peer.Uid) != os.Getuid() {
		return fmt.Errorf("process %d is of user %d", peer.Pid, peer.Uid)
	}
	// While the descriptor shows that the process is alive, no other process has its pid.
	// Package process opens it in a way that starts a child to test the kernel, and the portal would reap the child.
	pidfd, err := unix.PidfdOpen(int(peer.Pid), 0)
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	for pid := int(peer.Pid); pid != 0; {
		if pid == os.Getpid() {
			return fmt.Errorf("process %d is one of the sandbox", peer.Pid)
		}
		if pid, err = processes.Parent(pid); err != nil {
			return err
		}
	}
	// A portal that is not root may not send a signal to a bridge that is, but it learns that the bridge is alive.
	if err := unix.PidfdSendSignal(pidfd, 0, nil, 0); err != nil && !errors.Is(err, unix.EPERM) {
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	return nil
}
