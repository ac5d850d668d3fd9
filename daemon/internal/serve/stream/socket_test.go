package stream_test

import (
	"bufio"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	xwebsocket "golang.org/x/net/websocket"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// socket is the client's end of a WebSocket.
type socket struct {
	*websocket.Conn
	t *testing.T
}

// open connects to a path below the sandbox.
func (c *client) open(path string, change ...func(*websocket.DialOptions)) socket {
	c.t.Helper()
	o := &websocket.DialOptions{HTTPClient: c.http, HTTPHeader: http.Header{"Authorization": {"Bearer " + c.key}}}
	for _, f := range change {
		f(o)
	}
	conn, res, err := websocket.Dial(c.t.Context(), "ws://"+c.addr+"/api/v1/sandboxes/box/"+path, o)
	if err != nil {
		c.t.Fatal(res, err)
	}
	conn.SetReadLimit(1 << 20)
	c.t.Cleanup(func() { conn.CloseNow() })
	return socket{conn, c.t}
}

// text sends a text message.
func (s socket) text(text string) {
	s.t.Helper()
	if err := s.Write(context.Background(), websocket.MessageText, []byte(text)); err != nil {
		s.t.Error("send", err)
	}
}

// input sends standard input.
func (s socket) input(text string) {
	s.t.Helper()
	if err := s.Write(context.Background(), websocket.MessageBinary, []byte("\x00"+text)); err != nil {
		s.t.Error("send", err)
	}
}

// next returns the next message. The channel of a binary message is written as a digit.
func (s socket) next() string {
	s.t.Helper()
	messageType, text, err := s.Read(context.Background())
	if err != nil {
		s.t.Fatal("receive:", err)
	}
	if messageType == websocket.MessageBinary && len(text) > 0 {
		text[0] += '0'
	}
	return string(text)
}

// want checks the next messages. A warning that the process has ended may come before its exit.
func (s socket) want(messages ...string) {
	s.t.Helper()
	for _, want := range messages {
		got := s.next()
		if got == `{"warning":{"code":-32005,"message":"the process has ended"}}` {
			got = s.next()
		}
		if got != want {
			s.t.Errorf("got message %q, want %q", got, want)
		}
	}
}

// wantError checks that the next message is an error or a warning with a code and a text.
func (s socket) wantError(member string, code int, text string) {
	s.t.Helper()
	if got := s.next(); !strings.HasPrefix(got, fmt.Sprintf(`{"%s":{"code":%d,"message":`, member, code)) || !strings.Contains(got, text) {
		s.t.Errorf("got message %s, want %s %d with %q", got, member, code, text)
	}
}

// wantClose checks that the connection is closed with a status.
func (s socket) wantClose(status websocket.StatusCode) {
	s.t.Helper()
	if _, text, err := s.Read(context.Background()); websocket.CloseStatus(err) != status {
		s.t.Errorf("got %q, error %v; want a close frame with status %d", text, err, status)
	}
}

// A dead client is noticed, and one that is only slow is not cut off.
func TestPings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := newSite(t)
		c, _ := connectMemory(t, s)
		pings := 0
		alive := c.open("exec", func(o *websocket.DialOptions) {
			o.OnPingReceived = func(context.Context, []byte) bool { pings++; return true }
		})
		alive.text(`{"command":"cat","tag":"alive"}`)
		alive.next()
		messages := make(chan string)
		go func() { messages <- alive.next() }()
		time.Sleep(time.Hour + time.Second)
		if err := alive.Ping(t.Context()); err != nil {
			t.Error("the ping of a client was not answered:", err)
		}
		alive.input("still here")
		if got := <-messages; got != "1still here" || pings != 240 {
			t.Errorf("after an hour and %d pings, the client got %q; want 240 pings", pings, got)
		}
		alive.CloseNow()

		dead := c.open("exec", func(o *websocket.DialOptions) { o.OnPingReceived = func(context.Context, []byte) bool { return false } })
		dead.text(`{"command":"cat","tag":"dead","with_connection":true}`)
		dead.next()
		go dead.Read(context.Background())
		began := time.Now()
		p, err := d.process(sandbox.ProcessID{Tag: "dead"})
		if err != nil {
			t.Fatal(err)
		}
		<-p.done
		if took := time.Since(began); took != 75*time.Second {
			t.Errorf("a client that does not respond was noticed after %s, want 75 s", took)
		}

		// A process that does not read lets its client wait for as long as it likes.
		slow := c.open("exec")
		slow.text(`{"command":"wait","tag":"slow"}`)
		slow.next()
		slow.want("1out", "2err")
		go func() {
			for slow.Write(context.Background(), websocket.MessageBinary, make([]byte, 1<<19)) == nil {
			}
		}()
		go func() { messages <- slow.next() }()
		time.Sleep(time.Hour)
		if p, err = d.process(sandbox.ProcessID{Tag: "slow"}); err != nil {
			t.Fatal(err)
		}
		p.kill(15)
		if got := <-messages; !strings.Contains(got, "the process has ended") && got != `{"exit":143,"signal":"TERM"}` {
			t.Errorf("the slow client got %q", got)
		}
		slow.CloseNow()

		// A client may read nothing for almost a minute, and meanwhile send pings.
		d.set(hooks{scripted: func(ctx context.Context) (sandbox.Process, error) {
			return &endless{ctx: ctx, printed: new(atomic.Int64)}, nil
		}})
		lazy := c.open("exec")
		lazy.text(`{"command":"scripted"}`)
		lazy.next()
		for range 3 {
			time.Sleep(20 * time.Second)
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			lazy.Ping(ctx)
			cancel()
			lazy.next()
		}
		lazy.CloseNow()
	})
}

// A client that disconnects while the program does not read what it sends is noticed within two pings.
func TestGoneClients(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := newSite(t)
		c, _ := connectMemory(t, s)
		gone := func(client socket, ended <-chan struct{}) {
			t.Helper()
			go func() {
				for client.Write(context.Background(), websocket.MessageBinary, make([]byte, 1<<19)) == nil {
				}
			}()
			synctest.Wait() // until the program's input is full
			client.CloseNow()
			select {
			case <-ended:
			case <-time.After(31 * time.Second):
				t.Error("the call still runs 31 s after its client has disconnected")
			}
		}

		exec := c.open("exec")
		exec.text(`{"command":"wait","tag":"gone","with_connection":true}`)
		exec.next()
		exec.want("1out", "2err")
		p, err := d.process(sandbox.ProcessID{Tag: "gone"})
		if err != nil {
			t.Fatal(err)
		}
		gone(exec, p.done)

		program := newDeaf(false)
		d.set(hooks{dial: func() (sandbox.Conn, error) { return program, nil }})
		gone(c.open("ports/80"), program.closed)
	})
}

// When the key is revoked or the server stops, a WebSocket is closed with the reason, whatever the process does.
func TestSocketsEnd(t *testing.T) {
	for end, want := range map[string]websocket.StatusCode{"revoked": websocket.StatusPolicyViolation, "stopped": websocket.StatusGoingAway} {
		for _, path := range []string{"exec", "ports"} {
			t.Run(end+" "+path, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s, d := newSite(t)
					c, stop := connectMemory(t, s)
					key, id := s.IssueNamed(t, keys.IssueRequest{})
					c.key = key
					program, guest := net.Pipe()
					d.set(hooks{
						dial:     func() (sandbox.Conn, error) { return pipeToProgram{guest}, nil },
						scripted: func(ctx context.Context) (sandbox.Process, error) { return &stubborn{ctx: ctx}, nil },
					})
					defer program.Close()
					e := c.open(map[string]string{"exec": "exec", "ports": "ports/80"}[path])
					if path == "exec" {
						e.text(`{"command":"scripted"}`)
						e.next()
					}
					began := time.Now()
					if end == "stopped" {
						go stop()
					} else if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
						t.Fatal(err)
					}
					e.wantClose(want)
					if took := time.Since(began); end == "revoked" && took > time.Second || took > 10*time.Second {
						t.Errorf("the connection was closed after %s", took)
					}
				})
			})
		}
	}
}

// stubborn is a process that prints something when its client should get no more.
type stubborn struct {
	ctx     context.Context
	started bool
}

func (p *stubborn) Next() (sandbox.Event, error) {
	if !p.started {
		p.started = true
		return sandbox.Started{PID: 1}, nil
	}
	<-p.ctx.Done()
	return sandbox.Output{Stream: sandbox.Stdout, Data: []byte("a secret")}, nil
}

func (*stubborn) Close() error { return nil }

type pipeToProgram struct{ net.Conn }

func (pipeToProgram) CloseWrite() error { return nil }

// The handshake works with another implementation of the protocol, and with the key as a subprotocol.
func TestOtherClient(t *testing.T) {
	s, _ := newSite(t)
	c, _ := connect(t, s)
	config, err := xwebsocket.NewConfig("ws://"+c.addr+"/api/v1/sandboxes/box/exec", "https://example.com")
	if err != nil {
		t.Fatal(err)
	}
	config.Protocol = []string{"msb", "msb.key." + c.key}
	conn, err := config.DialContext(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if protocol := conn.Config().Protocol; len(protocol) != 1 || protocol[0] != "msb" {
		t.Errorf("the server has selected the subprotocols %q", protocol)
	}
	if err := xwebsocket.Message.Send(conn, `{"command":"echo","args":["hello"]}`); err != nil {
		t.Fatal(err)
	}
	var all []string
	for {
		var message []byte
		if err := xwebsocket.Message.Receive(conn, &message); err != nil {
			break
		}
		all = append(all, string(message))
	}
	if want := []string{`{"started":{"pid":100,"skipped_bytes":0}}`, "\x01hello\n", `{"exit":0}`}; fmt.Sprint(all) != fmt.Sprint(want) {
		t.Errorf("got %q, want %q", all, want)
	}
}

// A handshake that is not valid gets an error in JSON, and compression is not used.
func TestHandshakes(t *testing.T) {
	s, _ := newSite(t)
	c, _ := connect(t, s)
	key := base64.StdEncoding.EncodeToString(make([]byte, 16))
	for name, test := range map[string]struct {
		method, key string
		status      int
	}{
		"valid":     {"GET", key, 101},
		"short key": {"GET", "AAAA", 400},
		"no key":    {"GET", "", 400},
		"HEAD":      {"HEAD", key, 400},
	} {
		conn := c.dial()
		fmt.Fprintf(conn, "%s /api/v1/sandboxes/box/exec HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Extensions: permessage-deflate\r\nSec-WebSocket-Key: %s\r\n\r\n", test.method, c.key, test.key)
		res, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: test.method})
		if err != nil || res.StatusCode != test.status || res.Header.Get("Sec-WebSocket-Extensions") != "" {
			t.Errorf("%s: response is %v, error %v; want status %d", name, res, err, test.status)
		} else if text, _ := io.ReadAll(res.Body); test.status == 400 && test.method == "GET" && !strings.Contains(string(text), "handshake is not valid") {
			t.Errorf("%s: got %s", name, text)
		}
		conn.Close()
	}
}

// The connection of a client that sends a message that is not valid, but not the end of it, is closed.
func TestCloseDuringMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := newSite(t)
		c, _ := connectMemory(t, s)
		conn := c.dial()
		fmt.Fprintf(conn, "GET /api/v1/sandboxes/box/exec HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n", c.key, base64.StdEncoding.EncodeToString(make([]byte, 16)))
		in := bufio.NewReader(conn)
		if res, err := http.ReadResponse(in, nil); err != nil || res.StatusCode != 101 {
			t.Fatal(res, err)
		}
		// frame sends the header of a message of length bytes, and data. The mask is zero.
		frame := func(opcode byte, length int, data string) {
			conn.Write(append([]byte{0x80 | opcode, 0x80 | byte(length), 0, 0, 0, 0}, data...))
		}
		start := `{"command":"wait"}`
		frame(1, len(start), start)
		synctest.Wait()
		began := time.Now()
		frame(2, 100, "\x09ten bytes")
		received, err := io.ReadAll(in)
		if err != nil || !strings.Contains(string(received), "begins with the byte 0") {
			t.Errorf("received %q, error %v", received, err)
		}
		if took := time.Since(began); took != 5*time.Second {
			t.Errorf("the connection was closed after %s, want 5 s", took)
		}
	})
}

// In dev mode, a page of another site cannot connect.
func TestDevMode(t *testing.T) {
	s, _ := newSite(t, func(o *servetest.Setup) { o.Dev = true })
	c, _ := connect(t, s)
	for origin, status := range map[string]int{"": 101, "http://" + c.addr: 101, "https://example.com": 403, "null": 403, "http://localhost:1": 403} {
		h := http.Header{}
		if origin != "" {
			h.Set("Origin", origin)
		}
		conn, res, err := websocket.Dial(t.Context(), "ws://"+c.addr+"/api/v1/sandboxes/box/exec", &websocket.DialOptions{HTTPHeader: h})
		if res == nil || res.StatusCode != status || (err == nil) != (status == 101) {
			t.Errorf("origin %q: got %v, error %v; want status %d", origin, res, err, status)
		}
		if conn != nil {
			conn.CloseNow()
		}
	}
}

// A client that does not read makes the process wait.
func TestSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, d := newSite(t)
		c, stop := connectMemory(t, s)
		var printed atomic.Int64
		d.set(hooks{scripted: func(ctx context.Context) (sandbox.Process, error) { return &endless{ctx: ctx, printed: &printed}, nil }})
		e := c.open("exec")
		e.text(`{"command":"scripted"}`)
		e.next()
		synctest.Wait()
		if n := printed.Load(); n > 1<<20 {
			t.Errorf("the process has printed %d KiB that the client has not read", n>>10)
		}
		for range 100 {
			if message := e.next(); len(message) != 1+32<<10 || message[0] != '1' {
				t.Fatalf("got a message of %d bytes", len(message))
			}
		}
		began := time.Now()
		stop() // the client does not read, so the server gives up
		if took := time.Since(began); took > 11*time.Second {
			t.Errorf("the server has stopped after %s", took)
		}
	})
}

// endless is a process that prints without end.
type endless struct {
	ctx     context.Context
	printed *atomic.Int64
	started bool
	data    [32 << 10]byte
}

func (p *endless) Next() (sandbox.Event, error) {
	if p.ctx.Err() != nil {
		return nil, context.Cause(p.ctx)
	}
	if !p.started {
		p.started = true
		return sandbox.Started{PID: 1}, nil
	}
	p.printed.Add(int64(len(p.data)))
	return sandbox.Output{Stream: sandbox.Stdout, Data: p.data[:]}, nil
}

func (*endless) Close() error { return nil }
