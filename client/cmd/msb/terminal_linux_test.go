package main

import (
	"bytes"
	"context"
	"io"
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
	service := constantStatus{calls: make(chan struct{})}
	socket := serveAdmin(t, service)
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	app, out := newApp(), new(bytes.Buffer)
	app.Writer = out
	ended := make(chan error, 1)
	go func() {
		ended <- app.RunContext(ctx, []string{"msb", "--socket", socket, "server", "status", "--watch", "--json"})
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

// serveAdmin serves service until the test ends, and returns the path of its socket.
func serveAdmin(t *testing.T, service adminv1.AdminServiceServer) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "msb") // short, because a socket's path is limited
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	adminv1.RegisterAdminServiceServer(server, service)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	return l.Addr().String()
}

// importService is a server that reports the progress of an import.
type importService struct {
	adminv1.UnimplementedAdminServiceServer
}

func (importService) ImportImage(_ *adminv1.ImportImageRequest, stream adminv1.AdminService_ImportImageServer) error {
	for _, p := range []*adminv1.ImportProgress{
		{Phase: "reading", Done: 1 << 20, Total: 4 << 20},
		{Phase: "unpacking", Image: "a/b"},
		{Phase: "unpacking", Image: "c/\x1b[2J", Done: 3 << 20, Total: 4 << 20},
		{Phase: "unpacking", Image: "c/\x1b[2J", Done: 4 << 20, Total: 4 << 20},
	} {
		if err := stream.Send(&adminv1.ImportImageResponse{Progress: p}); err != nil {
			return err
		}
	}
	return stream.Send(&adminv1.ImportImageResponse{Images: []*adminv1.Image{{Name: "a/b"}, {Name: "c/d"}}})
}

// On a terminal, an import shows its progress in one line. Otherwise, it prints only the beginning and the end.
func TestImportShowsProgress(t *testing.T) {
	socket := serveAdmin(t, importService{})
	run := func(errWriter io.Writer) {
		t.Helper()
		app, out := newApp(), new(bytes.Buffer)
		app.Writer, app.ErrWriter = out, errWriter
		if err := app.RunContext(t.Context(), []string{"msb", "--socket", socket, "image", "import", "/x.tar"}); err != nil {
			t.Error(err)
		}
		if out.String() != "a/b\nc/d\n" {
			t.Errorf("printed %q", out)
		}
	}
	control, terminal := daemontest.OpenTerminal(t)
	run(terminal)
	var shown strings.Builder
	for !strings.Contains(shown.String(), "imported in") {
		text := make([]byte, 4096)
		n, err := control.Read(text)
		if err != nil {
			t.Fatal(err)
		}
		shown.Write(text[:n])
	}
	// Each phase is shown when it begins, and the last numbers at the end.
	rest := shown.String()
	for _, part := range []string{
		"importing /x.tar …\r\n\rreading 1.0 MiB of 4.0 MiB (25%)\x1b[K", "\runpacking a/b …\x1b[K",
		"\runpacking c/\\x1b[2J 3.0 MiB of 4.0 MiB (75%)\x1b[K", "\runpacking c/\\x1b[2J 4.0 MiB of 4.0 MiB (100%)\x1b[K\r\nimported in ",
	} {
		var found bool
		if _, rest, found = strings.Cut(rest, part); !found {
			t.Errorf("shown %q, want %q in it", shown.String(), part)
		}
	}

	plain := new(bytes.Buffer)
	run(plain)
	if lines := strings.Split(plain.String(), "\n"); len(lines) != 3 || lines[0] != "importing /x.tar …" || !strings.HasPrefix(lines[1], "imported in ") {
		t.Errorf("printed %q", plain)
	}
}
