package kata

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
)

// syslogSockets are where Go's log/syslog, and so Kata's shim, looks for a system log.
var syslogSockets = []string{"/dev/log", "/var/run/syslog", "/var/run/log"}

// syslogSink stands in for the system log on hosts that have none: Kata's shim refuses to start
// without one. What the shim says goes to the daemon's log at debug level.
type syslogSink struct {
	log *slog.Logger

	mu   sync.Mutex
	conn *net.UnixConn
	done sync.WaitGroup
}

// ensure makes sure that a system log answers. It is called before each start, because another
// server's sink may have ended.
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
	// Nothing answers there: what is left is a dead one's socket.
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == os.ModeSocket {
		os.Remove(path)
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err == nil {
		if err = os.Chmod(path, 0o600); err != nil { // shims are root's
			conn.Close()
		}
	}
	if err != nil {
		return fmt.Errorf("this host has no system log, which Kata's shim needs, and msbd could not stand in for it: %w", err)
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
