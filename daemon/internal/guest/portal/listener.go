package portal

import (
	"net"
	"sync"
)

// newestOnly is a listener that closes the previous connection when it accepts a new one. If a daemon is killed, its
// bridge may stay connected. The connection of the next daemon's bridge then replaces it.
type newestOnly struct {
	net.Listener
	mu   sync.Mutex
	last net.Conn
}

func (l *newestOnly) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last != nil {
		l.last.Close()
	}
	l.last = conn
	return conn, nil
}
