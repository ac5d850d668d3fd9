package gate

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/portalport"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// helloTime is how long the gate waits for a hello.
const helloTime = 10 * time.Second

var loopback = netip.MustParseAddr("127.0.0.1")

// serveGate serves a gate on a loopback port, to connections from host, until the test ends.
func serveGate(t *testing.T, host netip.Addr) (*Gate, string) {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := New(slog.New(slog.DiscardHandler))
	served := make(chan struct{})
	go func() {
		defer close(served)
		g.serve(l, host)
	}()
	t.Cleanup(func() {
		l.Close()
		<-served
	})
	return g, l.Addr().String()
}

// setPortal gives the gate a portal, and returns the portal's end of the socket.
func setPortal(t *testing.T, g *Gate) *net.UnixConn {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "portal")
		conn, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = conn.(*net.UnixConn)
	}
	t.Cleanup(func() { ends[1].Close() })
	g.SetPortal(ends[0])
	return ends[1]
}

// connect connects to the gate with a hello.
func connect(t *testing.T, address string, h portalport.Hello) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := portalport.WriteHello(conn, h); err != nil {
		t.Fatal(err)
	}
	return conn
}

// receive receives a connection as the portal does.
func receive(t *testing.T, socket *net.UnixConn) (message string, conn net.Conn) {
	t.Helper()
	data, rights := make([]byte, 64), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := socket.ReadMsgUnix(data, rights)
	if err != nil {
		t.Fatal(err)
	}
	messages, err := unix.ParseSocketControlMessage(rights[:oobn])
	if err != nil || len(messages) != 1 {
		t.Fatal(messages, err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		t.Fatal(fds, err)
	}
	f := os.NewFile(uintptr(fds[0]), "connection")
	defer f.Close()
	if conn, err = net.FileConn(f); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return string(data[:n]), conn
}

// wantClosed checks that the gate has closed conn without sending anything.
func wantClosed(t *testing.T, what string, conn net.Conn) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(helloTime / 2)); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: read %d bytes, %v, want that the connection is closed", what, n, err)
	}
}

// TestPass passes connections to the portal, with all that follows the hello. One of them waits for the portal.
func TestPass(t *testing.T) {
	g, address := serveGate(t, loopback)
	token := portalport.NewToken()
	g.SetToken(token)
	early := connect(t, address, portalport.Hello{Token: token})
	socket := setPortal(t, g)
	transfer := strings.Repeat("0f", 16)
	for _, want := range []string{"\x00", "\x00" + transfer} {
		host := early
		if want != "\x00" {
			host = connect(t, address, portalport.Hello{Token: token, Transfer: want[1:]})
		}
		if _, err := io.WriteString(host, "to the portal"); err != nil {
			t.Fatal(err)
		}
		message, conn := receive(t, socket)
		if message != want {
			t.Errorf("the portal got the message %q, want %q", message, want)
		}
		// The gate has closed its own descriptor, or will, so that only the portal ends the connection.
		got := make([]byte, 13)
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != "to the portal" {
			t.Errorf("the portal reads %q, %v", got, err)
		}
		if _, err := conn.Write([]byte("answer")); err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if got, err := io.ReadAll(host); string(got) != "answer" || err != nil {
			t.Errorf("the host reads %q, %v", got, err)
		}
	}
	socket.Close()
	wantClosed(t, "after the end of the portal", connect(t, address, portalport.Hello{Token: token}))
}

// TestRefuse refuses connections without the token: before there is one, with another one, and with an earlier one. A new
// token leaves the connections that the portal has open.
func TestRefuse(t *testing.T) {
	g, address := serveGate(t, loopback)
	socket := setPortal(t, g)
	first, second := portalport.NewToken(), portalport.NewToken()
	wantClosed(t, "without a token", connect(t, address, portalport.Hello{Token: first}))
	g.SetToken(first)
	wantClosed(t, "another token", connect(t, address, portalport.Hello{Token: second}))
	host := connect(t, address, portalport.Hello{Token: first})
	_, conn := receive(t, socket)
	g.SetToken(second)
	wantClosed(t, "an earlier token", connect(t, address, portalport.Hello{Token: first}))
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if n, err := host.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Errorf("an open connection after a new token: %d, %v", n, err)
	}
	garbage, err := net.Dial("tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	defer garbage.Close()
	if _, err := io.WriteString(garbage, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, "no hello", garbage)
}

// TestTokenEndsWhileAConnectionWaits gives the gate another token while a connection waits for the portal.
func TestTokenEndsWhileAConnectionWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(slog.New(slog.DiscardHandler))
		token := portalport.NewToken()
		g.SetToken(token)
		result := make(chan error)
		wait := func(token string) {
			_, err := g.awaitPortal(token)
			result <- err
		}
		go wait(token)
		synctest.Wait()
		g.SetToken(portalport.NewToken())
		if err := <-result; err != errToken {
			t.Errorf("after another token: %v", err)
		}
		g.SetToken(token)
		began := time.Now()
		go wait(token)
		if err := <-result; err != errTimeout || time.Since(began) != portalTimeout {
			t.Errorf("without a portal: %v after %v", err, time.Since(began))
		}
	})
}

// TestOtherAddress connects from an address that is not the host's. The connection is closed before its hello.
func TestOtherAddress(t *testing.T) {
	g, address := serveGate(t, netip.MustParseAddr("127.0.0.2"))
	setPortal(t, g)
	g.SetToken(portalport.NewToken())
	conn, err := net.Dial("tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	wantClosed(t, "another address", conn)
}

// TestPendingIsBounded opens more connections without a hello than there may be. Their end makes room for others.
func TestPendingIsBounded(t *testing.T) {
	g, address := serveGate(t, loopback)
	token := portalport.NewToken()
	g.SetToken(token)
	socket := setPortal(t, g)
	var pending []net.Conn
	for range maxPending + 1 {
		conn, err := net.Dial("tcp4", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		pending = append(pending, conn)
	}
	wantClosed(t, "one too many", pending[maxPending])
	for _, conn := range pending[:maxPending] {
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		wantClosed(t, "without a hello", conn)
	}
	connect(t, address, portalport.Hello{Token: token})
	receive(t, socket)
}

// TestAwaitReady waits for portals that are ready at once, later, and never.
func TestAwaitReady(t *testing.T) {
	g, _ := serveGate(t, loopback)
	if g.AwaitReady(time.Millisecond) {
		t.Error("ready without a portal")
	}
	result := make(chan bool)
	go func() { result <- g.AwaitReady(time.Minute) }()
	socket := setPortal(t, g)
	if g.AwaitReady(time.Millisecond) {
		t.Error("ready before the portal says so")
	}
	if _, err := socket.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	if !<-result || !g.AwaitReady(time.Minute) {
		t.Error("not ready after the portal has said so")
	}
	p := g.portal
	socket.Close()
	<-p.ended
	if g.AwaitReady(time.Minute) {
		t.Error("ready after the end of the portal")
	}
}
