package portal

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// bridges is a listener that accepts only the connections of bridges (Connect) that msbd has started. It closes the
// previous connection when it accepts a new one. If a daemon is killed, its bridge may stay connected. The connection
// of the next daemon's bridge then replaces it.
type bridges struct {
	net.Listener
	mu   sync.Mutex
	last net.Conn
}

func (l *bridges) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if checkBridge(conn) != nil {
			conn.Close()
			continue
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.last != nil {
			l.last.Close()
		}
		l.last = conn
		return conn, nil
	}
}

// checkBridge returns an error unless msbd has started the process at the other end of conn. All processes of the
// sandbox are descendants of the portal, because it is the reaper of their orphans. A bridge is not, because the
// guest's agent starts it from outside of the container. The bridge is root, or the user of the portal.
func checkBridge(conn net.Conn) error {
	raw, err := conn.(*net.UnixConn).SyscallConn()
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
	process, err := unix.PidfdOpen(int(peer.Pid), 0)
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(process)
	for pid := int(peer.Pid); pid != 0; {
		if pid == os.Getpid() {
			return fmt.Errorf("process %d is one of the sandbox", peer.Pid)
		}
		if pid, err = parent(pid); err != nil {
			return err
		}
	}
	// A portal that is not root may not send a signal to a bridge that is, but it learns that the bridge is alive.
	if err := unix.PidfdSendSignal(process, 0, nil, 0); err != nil && !errors.Is(err, unix.EPERM) {
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	return nil
}

// parent returns the pid of a process's parent, or 0 if the parent is in another pid namespace.
func parent(pid int) (int, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The format is "pid (name) state ppid …". The name can contain anything.
	_, rest, _ := strings.Cut(string(stat[max(0, strings.LastIndexByte(string(stat), ')')):]), ") ")
	fields := strings.Fields(rest)
	if len(fields) < 2 {
		return 0, fmt.Errorf("/proc/%d/stat is %q", pid, stat)
	}
	return strconv.Atoi(fields[1])
}
