package portal

import (
	"net"
	"sync"
)

// newestOnly is a listener whose newest connection replaces the one before. A daemon that was
// killed leaves its bridge connected; its successor's bridge ends it.
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
