package portal

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	processes "github.com/msbd/msbd/daemon/internal/sys/process"
)

// bridges is a listener that accepts only the connections of bridges (Connect) that msbd has started. It closes the
// previous connection when it accepts a new one. If a daemon is killed, its bridge may stay connected. The connection
// of the next daemon's bridge then replaces it. Only one goroutine may call Accept.
type bridges struct {
	net.Listener
	transfers *transfers // get the pipes that are for a transfer
	last      *pipes
}

func (l *bridges) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
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
		if p.transfer != "" {
			l.transfers.begin(p)
			continue
		}
		if l.last != nil {
			l.last.Close()
		}
		l.last = p
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
