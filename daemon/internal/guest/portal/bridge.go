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

// socketWait is how long Connect waits for the server's socket: an emulated machine needs a
// while to get there.
const socketWait = 30 * time.Second

// Connect carries bytes between in, out and the server at socket until one side ends or ctx is done. It may
// leave a read of in behind, and is meant for a process that exits then.
func Connect(ctx context.Context, socket string, in io.Reader, out io.Writer) error {
	conn, err := dial(ctx, socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	ended := make(chan error, 2)
	go func() { _, err := io.Copy(conn, in); ended <- err }()
	go func() { _, err := io.Copy(out, conn); ended <- err }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return nil
	}
}

// dial waits for the socket to appear.
func dial(ctx context.Context, socket string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, socketWait)
	defer cancel()
	for {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", socket)
		if err == nil || !errors.Is(err, syscall.ECONNREFUSED) {
			return conn, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the portal at %s: %w", socket, err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
