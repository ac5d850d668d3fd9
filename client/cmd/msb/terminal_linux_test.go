package main

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/daemontest"
)

// On a terminal, --watch redraws the status each time. Ctrl-C ends it without an error.
func TestWatchRedrawsTerminal(t *testing.T) {
	control, terminal := daemontest.OpenTerminal(t)
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	app := newApp()
	app.Writer = terminal
	ended := make(chan error, 1)
	go func() {
		ended <- app.RunContext(ctx, []string{"msb", "--socket", filepath.Join(t.TempDir(), "none"), "server", "status", "--watch"})
	}()
	var seen strings.Builder
	for strings.Count(seen.String(), clearTerminal) < 2 || !strings.HasSuffix(seen.String(), "\n") {
		text := make([]byte, 4096)
		n, err := control.Read(text)
		if err != nil {
			t.Fatal(err)
		}
		seen.Write(text[:n])
	}
	if !strings.Contains(seen.String(), "msbd is not running") {
		t.Errorf("got %q", seen.String())
	}
	interrupt()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// constantStatus is a server whose status never changes. It sends to calls on each request for the status.
type constantStatus struct {
	adminv1.UnimplementedAdminServiceServer
	calls chan struct{}
}

func (s constantStatus) GetStatus(context.Context, *adminv1.GetStatusRequest) (*adminv1.GetStatusResponse, error) {
	s.calls <- struct{}{}
	return &adminv1.GetStatusResponse{State: ready}, nil
}

// If the output is not a terminal, --watch prints each status only once.
func TestWatchPrintsChangesOnly(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "msb") // short, because a socket's path is limited
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	server, service := grpc.NewServer(), constantStatus{calls: make(chan struct{})}
	adminv1.RegisterAdminServiceServer(server, service)
	go server.Serve(l)
	defer server.Stop()

	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	app, out := newApp(), new(bytes.Buffer)
	app.Writer = out
	ended := make(chan error, 1)
	go func() {
		ended <- app.RunContext(ctx, []string{"msb", "--socket", l.Addr().String(), "server", "status", "--watch", "--json"})
	}()
	for range 3 {
		<-service.calls
	}
	interrupt()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if got := strings.Count(out.String(), "\n"); got != 1 {
		t.Errorf("%d documents:\n%s", got, out)
	}
}
