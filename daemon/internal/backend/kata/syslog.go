package kata

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
)

// syslogSockets are the sockets that Go's log/syslog, and so Kata's shim, tries for the system log.
var syslogSockets = []string{"/dev/log", "/var/run/syslog", "/var/run/log"}

// A syslogSink replaces the system log on hosts that have none, because Kata's shim does not start without one. It
// writes the shims' messages to the daemon's log at debug level.
type syslogSink struct {
	log *slog.Logger

	mu   sync.Mutex
	conn *net.UnixConn
	done sync.WaitGroup
}

// ensure starts listening unless the host has a system log. It is called before each start of a shim, because the
// system log may have been the sink of another server that has stopped.
func (s *syslogSink) ensure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, path := range syslogSockets {
		if c, err := net.Dial("unixgram", path); err == nil {
			c.Close()
			return nil
		}
	}
	path := syslogSockets[1]
	// Nothing listens there, so an existing socket is left from a process that has ended.
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == os.ModeSocket {
		os.Remove(path)
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err == nil {
		if err = os.Chmod(path, 0o600); err != nil { // shims run as root
			conn.Close()
		}
	}
	if err != nil {
		return fmt.Errorf("provide a system log, which Kata's shim needs and this host does not have: %w", err)
	}
	s.closeLocked()
	s.conn = conn
	s.done.Go(func() {
		buf := make([]byte, 8<<10)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			s.log.Debug("kata shim", "line", strings.TrimSpace(string(buf[:n])))
		}
	})
	return nil
}

func (s *syslogSink) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeLocked()
}

func (s *syslogSink) closeLocked() {
	if s.conn != nil {
		s.conn.Close() // removes the socket's file
		s.conn = nil
		s.done.Wait()
	}
}
