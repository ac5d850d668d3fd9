package portal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// socketTimeout is how long Connect waits for the server to listen. On an emulated machine the server takes a
// while to start.
const socketTimeout = 30 * time.Second

// Connect gives in and out, which are pipes, to the server that Serve runs at socket. The server then reads and writes them
// itself, because a copy of each message would cost time. If transfer is not empty, they are for the transfer that the server
// has offered with this id. Connect returns when the server has ended the connection or ctx is done. The end of this process
// ends the connection.
func Connect(ctx context.Context, socket, transfer string, in, out *os.File) error {
	conn, err := dial(ctx, socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	_, _, err = conn.WriteMsgUnix([]byte("\x00"+transfer), unix.UnixRights(int(in.Fd()), int(out.Fd())), nil)
	if err == nil {
		_, err = io.Copy(io.Discard, conn)
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// pipeSize is the size of each pipe, in bytes. In an emulated guest with one processor, a change of the process takes long, so
// the portal should write much at once.
const pipeSize = 1 << 20

// receiveTimeout is how long a bridge may take to send its pipes.
const receiveTimeout = 10 * time.Second

// pipes is a connection over the pipes of a bridge.
type pipes struct {
	in, out  *os.File
	bridge   *net.UnixConn
	transfer string // the id of the transfer that they are for; empty for a connection of msbd
}

// receivePipes receives the pipes that Connect sends.
func receivePipes(bridge *net.UnixConn) (*pipes, error) {
	if err := bridge.SetReadDeadline(time.Now().Add(receiveTimeout)); err != nil {
		return nil, err
	}
	data, rights := make([]byte, 1+transferID), make([]byte, unix.CmsgSpace(2*4))
	length, n, _, _, err := bridge.ReadMsgUnix(data, rights)
	if err != nil {
		return nil, err
	}
	fds, err := receivedDescriptors(rights[:n])
	if err != nil {
		return nil, err
	}
	if len(fds) != 2 {
		closeDescriptors(fds)
		return nil, fmt.Errorf("the bridge sent %d descriptors", len(fds))
	}
	p := &pipes{bridge: bridge, transfer: string(data[min(1, length):length])}
	for i, file := range []**os.File{&p.in, &p.out} {
		err = errors.Join(err, unix.SetNonblock(fds[i], true))             // so that Close ends a Read or Write
		_, _ = unix.FcntlInt(uintptr(fds[i]), unix.F_SETPIPE_SZ, pipeSize) // a smaller pipe works as well
		*file = os.NewFile(uintptr(fds[i]), "bridge")
	}
	if err == nil {
		err = bridge.SetReadDeadline(time.Time{})
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	go func() {
		_, _ = io.Copy(io.Discard, bridge) // until the bridge ends
		p.Close()
	}()
	return p, nil
}

func (p *pipes) transferID() string                 { return p.transfer }
func (p *pipes) Read(b []byte) (int, error)         { return p.in.Read(b) }
func (p *pipes) Write(b []byte) (int, error)        { return p.out.Write(b) }
func (p *pipes) Close() error                       { return errors.Join(p.bridge.Close(), p.in.Close(), p.out.Close()) }
func (p *pipes) LocalAddr() net.Addr                { return p.bridge.LocalAddr() }
func (p *pipes) RemoteAddr() net.Addr               { return p.bridge.RemoteAddr() }
func (p *pipes) SetReadDeadline(t time.Time) error  { return p.in.SetReadDeadline(t) }
func (p *pipes) SetWriteDeadline(t time.Time) error { return p.out.SetWriteDeadline(t) }
func (p *pipes) SetDeadline(t time.Time) error {
	return errors.Join(p.SetReadDeadline(t), p.SetWriteDeadline(t))
}

// dial connects to socket. While nothing listens there, or too many connections wait there, it retries for up to
// socketTimeout.
func dial(ctx context.Context, socket string) (*net.UnixConn, error) {
	ctx, cancel := context.WithTimeout(ctx, socketTimeout)
	defer cancel()
	for {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", socket)
		if err == nil {
			return conn.(*net.UnixConn), nil
		}
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EAGAIN) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the portal at %s: %w", socket, err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
