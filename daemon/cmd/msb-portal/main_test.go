package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/guest/portalclient"
)

// asPortal in the environment makes the test binary behave as msb-portal.
const asPortal = "MSB_PORTAL_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asPortal) != "" {
		os.Unsetenv(asPortal)
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

func msbPortal(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), asPortal+"=1")
	cmd.Stderr = os.Stderr
	return cmd
}

var sockets atomic.Int64

// guest is a running `msb-portal serve`.
type guest struct{ socket string }

func newGuest() *guest {
	return &guest{socket: fmt.Sprintf("@msb-portal-test-%d-%d", os.Getpid(), sockets.Add(1))}
}

// startGuest starts the portal's server as a sandbox would, with env over the test's own.
func startGuest(t testing.TB, env ...string) *guest {
	t.Helper()
	g := newGuest()
	g.serve(t, env...)
	return g
}

func (g *guest) serve(t testing.TB, env ...string) {
	t.Helper()
	cmd := msbPortal(t, "serve", g.socket)
	cmd.Env = append(cmd.Env, env...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("portal after SIGTERM: %v", err)
		}
	})
}

// bridge is a running `msb-portal connect`.
type bridge struct {
	io.Reader
	io.WriteCloser
	// ended is closed when the process has exited.
	ended chan struct{}
}

func (g *guest) bridge(t testing.TB) *bridge {
	t.Helper()
	cmd := msbPortal(t, "connect", g.socket)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	// Not StdoutPipe, which Wait would close below a reader.
	out, outEnd, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = outEnd
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	outEnd.Close()
	b := &bridge{Reader: out, WriteCloser: in, ended: make(chan struct{})}
	go func() { _ = cmd.Wait(); close(b.ended) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-b.ended
		out.Close()
	})
	return b
}

// connect returns a client of the guest.
func (g *guest) connect(t testing.TB) *portalclient.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := portalclient.New(ctx, g.bridge(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// text shows lines as "stream: text", one a line.
func text(lines []sandbox.Line) string {
	var s string
	for _, l := range lines {
		s += string(l.Stream) + ": " + l.Text + "\n"
	}
	return s
}
