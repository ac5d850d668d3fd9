package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
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

// connection is a connection to a guest, with runs that are read to their end.
type connection struct{ *portalclient.Client }

// connect returns a client of the guest.
func (g *guest) connect(t testing.TB) *connection {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := portalclient.New(ctx, g.bridge(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &connection{c}
}

// The portal and its client keep the contract that the fakes of other tests keep.
func TestContract(t *testing.T) {
	sandboxtest.TestPortal(t, func(t *testing.T) sandbox.Portal { return startGuest(t).connect(t) })
}

// output is what a run printed, piece by piece.
type output []sandbox.Output

type codeResult struct {
	Success bool
	Output  output
}

type commandResult struct {
	ExitCode int
	Output   output
}

func (c *connection) runCode(ctx context.Context, code sandbox.Code) (codeResult, error) {
	out, exit, err := collect(c.RunCode(ctx, code))
	return codeResult{exit == 0, out}, err
}

func (c *connection) runCommand(ctx context.Context, command sandbox.Command) (commandResult, error) {
	out, exit, err := collect(c.RunCommand(ctx, command))
	return commandResult{exit, out}, err
}

func collect(p sandbox.Process, err error) (out output, exit int, _ error) {
	if err != nil {
		return nil, 0, err
	}
	defer p.Close()
	for {
		event, err := p.Next()
		switch event := event.(type) {
		case sandbox.Output:
			out = append(out, event)
		case sandbox.Exit:
			return out, event.Code, nil
		case nil:
			return out, 0, err
		}
	}
}

// text shows output as "stream: text", one a line.
func text(out output) string {
	var streams [2]strings.Builder
	var all strings.Builder
	names := []sandbox.Stream{sandbox.Stdout, sandbox.Stderr}
	for _, o := range out {
		i := slices.Index(names, o.Stream)
		for piece := range strings.Lines(string(o.Data)) {
			streams[i].WriteString(piece)
			if strings.HasSuffix(piece, "\n") {
				all.WriteString(string(o.Stream) + ": " + streams[i].String())
				streams[i].Reset()
			}
		}
	}
	for i, name := range names {
		if streams[i].Len() > 0 {
			all.WriteString(string(name) + ": " + streams[i].String() + "\n")
		}
	}
	return all.String()
}
