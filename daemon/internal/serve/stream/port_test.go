package stream_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// program listens on a port and handles one connection.
func program(t *testing.T, handle func(net.Conn)) (path string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		handle(conn)
	}()
	t.Cleanup(func() {
		ln.Close()
		<-ended
	})
	return fmt.Sprintf("ports/%d", ln.Addr().(*net.TCPAddr).Port)
}

// Both directions carry any bytes, at once and in order.
func TestPort(t *testing.T) {
	s, d := newSite(t)
	c, _ := connect(t, s)
	path := program(t, func(conn net.Conn) { io.Copy(conn, conn) })
	p := c.open(path + "?namespace=team")
	if calls := d.takeCalls(); len(calls) != 1 || calls[0] != "dial in team" {
		t.Errorf("got calls %q", calls)
	}
	sent := bytes.Repeat([]byte("\x00\xff\r\n0123456789"), 1<<18)
	go func() {
		for data := sent; len(data) > 0; {
			n := min(len(data), 1<<20-1)
			if err := p.Write(context.Background(), websocket.MessageBinary, data[:n]); err != nil {
				t.Error(err)
				return
			}
			data = data[n:]
		}
	}()
	var received bytes.Buffer
	for received.Len() < len(sent) {
		_, data, err := p.Read(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		received.Write(data)
	}
	if !bytes.Equal(received.Bytes(), sent) {
		t.Error("the bytes differ")
	}
	if err := p.Close(websocket.StatusNormalClosure, ""); err != nil {
		t.Error("close:", err)
	}
	// The end of the test waits until the program has seen the end.
}

// When the program closes the connection, what it has sent arrives before the close frame, even if it does not read what the
// client sends.
func TestPortClosedByProgram(t *testing.T) {
	s, _ := newSite(t)
	c, _ := connect(t, s)
	const size = 1 << 20
	for name, handle := range map[string]func(net.Conn){
		"closed": func(conn net.Conn) { io.CopyN(conn, zeros{}, size) },
		"no longer reads": func(conn net.Conn) {
			conn.(*net.TCPConn).CloseRead()
			io.CopyN(conn, zeros{}, size)
		},
	} {
		p := c.open(program(t, handle))
		n := 0
		for {
			messageType, data, err := p.Read(t.Context())
			if err != nil {
				if websocket.CloseStatus(err) != websocket.StatusNormalClosure {
					t.Errorf("%s: got %v, want a normal close frame", name, err)
				}
				break
			}
			if messageType != websocket.MessageBinary {
				t.Errorf("%s: got a text message: %s", name, data)
			}
			n += len(data)
		}
		if n != size {
			t.Errorf("%s: got %d bytes, want %d", name, n, size)
		}
	}
}

// refusing is a program that accepts no input, and then answers.
type refusing struct {
	refused chan struct{}
	answer  io.Reader
}

func (r *refusing) Write([]byte) (int, error) {
	close(r.refused) // panics if it is called again
	return 0, net.ErrClosed
}

func (r *refusing) Read(p []byte) (int, error) {
	<-r.refused
	return r.answer.Read(p)
}

func (*refusing) CloseWrite() error { return nil }
func (*refusing) Close() error      { return nil }

// What the program does not accept is discarded. The answer that says why still arrives.
func TestPortRefusesInput(t *testing.T) {
	s, d := newSite(t)
	c, _ := connect(t, s)
	answer, program := io.Pipe()
	d.set(hooks{dial: func() (sandbox.Conn, error) { return &refusing{make(chan struct{}), answer}, nil }})
	p := c.open("ports/80")
	for range 3 {
		if err := p.Write(t.Context(), websocket.MessageBinary, []byte("request")); err != nil {
			t.Error(err)
		}
	}
	go func() {
		program.Write([]byte("too long"))
		program.Close()
	}()
	if _, data, err := p.Read(t.Context()); err != nil || string(data) != "too long" {
		t.Errorf("got %q, error %v; want the answer", data, err)
	}
	p.wantClose(websocket.StatusNormalClosure)
}

// deaf is a connection to a program that does not read.
type deaf struct {
	half    bool          // whether the program ends its direction when it gets something
	written chan struct{} // closed when Write is called, which happens once
	closed  chan struct{} // closed by Close
	close   func()
}

func newDeaf(half bool) *deaf {
	d := &deaf{half: half, written: make(chan struct{}), closed: make(chan struct{})}
	d.close = sync.OnceFunc(func() { close(d.closed) })
	return d
}

func (d *deaf) Write([]byte) (int, error) {
	close(d.written)
	<-d.closed
	return 0, net.ErrClosed
}

func (d *deaf) Read([]byte) (int, error) {
	if d.half {
		<-d.written
		return 0, io.EOF
	}
	<-d.closed
	return 0, net.ErrClosed
}

func (*deaf) CloseWrite() error { return nil }

func (d *deaf) Close() error {
	d.close()
	return nil
}

// When the program ends its direction, the connection ends, even if the program does not read what the client sends.
func TestPortEndedByDeafProgram(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := newSite(t)
		c, _ := connectMemory(t, s)
		program := newDeaf(true)
		d.set(hooks{dial: func() (sandbox.Conn, error) { return program, nil }})
		p := c.open("ports/80")
		if err := p.Write(t.Context(), websocket.MessageBinary, []byte("request")); err != nil {
			t.Error(err)
		}
		p.wantClose(websocket.StatusNormalClosure)
		select {
		case <-program.closed:
		case <-time.After(time.Minute):
			t.Error("the connection to the program is still open a minute after its end")
			program.Close()
		}
	})
}

// zeros is a reader without an end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestPortErrors(t *testing.T) {
	s, d := newSite(t)
	c, _ := connect(t, s)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := ln.Addr().(*net.TCPAddr).Port
	ln.Close()
	_, res, err := websocket.Dial(t.Context(), fmt.Sprintf("ws://%s/api/v1/sandboxes/box/ports/%d", c.addr, port),
		&websocket.DialOptions{HTTPHeader: http.Header{"Authorization": {c.key}}})
	if err == nil || res == nil || res.StatusCode != http.StatusNotFound {
		t.Fatalf("got %v, error %v; want a 404", res, err)
	}
	if text, _ := io.ReadAll(res.Body); !strings.Contains(string(text), fmt.Sprintf(`"code":-32003,"message":"nothing listens on port %d`, port)) {
		t.Errorf("got %s", text)
	}

	p := c.open(program(t, func(conn net.Conn) { io.Copy(io.Discard, conn) }))
	p.text("hello")
	p.wantError("error", -32600, "send binary frames")
	p.wantClose(websocket.StatusUnsupportedData)

	reset := c.open(program(t, func(conn net.Conn) {
		conn.Read(make([]byte, 1))
		conn.(*net.TCPConn).SetLinger(0) // a reset instead of an end
	}))
	if err := reset.Write(t.Context(), websocket.MessageBinary, []byte("x")); err != nil {
		t.Error(err)
	}
	reset.wantError("error", -32010, "was lost")
	reset.wantClose(websocket.StatusInternalError)

	lost, sandboxSide := io.Pipe()
	sandboxSide.CloseWithError(fmt.Errorf("the request was interrupted, because sandbox team/box was stopped: %w", sandbox.ErrRunFailed))
	ready := make(chan struct{})
	close(ready)
	d.set(hooks{dial: func() (sandbox.Conn, error) { return &refusing{ready, lost}, nil }})
	stopped := c.open("ports/80")
	stopped.wantError("error", -32010, "because sandbox team/box was stopped")
	stopped.wantClose(websocket.StatusInternalError)
	d.set(hooks{})

	large := c.open(program(t, func(conn net.Conn) { io.Copy(io.Discard, conn) }))
	if err := large.Write(t.Context(), websocket.MessageBinary, make([]byte, 1<<20)); err != nil {
		t.Error(err)
	}
	go large.Write(context.Background(), websocket.MessageBinary, make([]byte, 1<<20+1))
	large.wantClose(websocket.StatusMessageTooBig)
}

// A client that leaves ends the connection to the program, also without a close frame.
func TestPortClosedByClient(t *testing.T) {
	s, _ := newSite(t)
	c, _ := connect(t, s)
	ended := make(chan int64, 1)
	p := c.open(program(t, func(conn net.Conn) {
		n, _ := io.Copy(io.Discard, conn)
		ended <- n
	}))
	if err := p.Write(t.Context(), websocket.MessageBinary, make([]byte, 1000)); err != nil {
		t.Error(err)
	}
	p.CloseNow()
	if n := <-ended; n != 1000 {
		t.Errorf("the program got %d bytes before the end, want 1000", n)
	}
}
