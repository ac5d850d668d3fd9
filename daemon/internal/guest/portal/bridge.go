package portal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"
)

// socketTimeout is how long Connect waits for the server to listen. On an emulated machine the server takes a
// while to start.
const socketTimeout = 30 * time.Second

// Connect connects in and out to the server that Serve runs at socket. It copies the bytes of in to the server, and the
// server's bytes to out. It returns when either side ends or ctx is done. A goroutine may then still be blocked in a
// read of in, so the process should exit.
func Connect(ctx context.Context, socket string, in io.Reader, out io.Writer) error {
	conn, err := dial(ctx, socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	copied := make(chan error, 2)
	go func() { _, err := io.Copy(conn, in); copied <- err }()
	go func() { _, err := io.Copy(out, conn); copied <- err }()
	select {
	case err := <-copied:
		return err
	case <-ctx.Done():
		return nil
	}
}

// dial connects to socket. While nothing listens there, or too many connections wait there, it retries for up to
// socketTimeout.
func dial(ctx context.Context, socket string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, socketTimeout)
	defer cancel()
	for {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", socket)
		if err == nil || !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EAGAIN) {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the portal at %s: %w", socket, err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
