package client

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

func TestDialFailuresSayWhatToDo(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale.sock")
	l, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	tests := map[string]struct {
		admin *Admin
		is    error
		hint  string
	}{
		"missing": {&Admin{Socket: filepath.Join(dir, "missing.sock")}, ErrNotRunning, "msb server start"},
		"stale":   {&Admin{Socket: stale}, ErrNotRunning, stale},
		"forbidden": {&Admin{Dial: func(context.Context, string) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EACCES)}
		}}, errdefs.ErrPermissionDenied, "group"},
		"other": {&Admin{Dial: func(context.Context, string) (net.Conn, error) {
			return nil, syscall.EMFILE
		}}, syscall.EMFILE, "connect to msbd"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			defer tt.admin.Close()
			if _, err := tt.admin.Status(t.Context()); !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.hint) {
				t.Errorf("got %v, want %v with %q", err, tt.is, tt.hint)
			}
		})
	}
}

// server answers CreateKey with an error of its choice.
type server struct {
	adminv1.UnimplementedAdminServiceServer
	err error
}

func (s *server) CreateKey(_ context.Context, req *adminv1.CreateKeyRequest) (*adminv1.CreateKeyResponse, error) {
	return &adminv1.CreateKeyResponse{Key: "key of " + req.GetNamespace()}, s.err
}

func serve(t *testing.T, socket string) (s *server, stop func()) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s = new(server)
	g := grpc.NewServer()
	adminv1.RegisterAdminServiceServer(g, s)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	return s, func() {
		g.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
}

func TestServerErrorsHaveClasses(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	s, stop := serve(t, socket)
	defer stop()
	a := &Admin{Socket: socket}
	defer a.Close()
	create := func() error {
		_, err := a.CreateKey(t.Context(), &adminv1.CreateKeyRequest{})
		return err
	}
	for code, class := range map[codes.Code]error{
		codes.InvalidArgument:    errdefs.ErrInvalidArgument,
		codes.NotFound:           errdefs.ErrNotFound,
		codes.FailedPrecondition: errdefs.ErrFailedPrecondition,
		codes.PermissionDenied:   errdefs.ErrPermissionDenied,
		codes.Unavailable:        errdefs.ErrUnavailable,
		codes.Internal:           errdefs.ErrInternal,
		codes.Unknown:            errdefs.ErrInternal,
	} {
		s.err = status.Error(code, "what happened")
		if err := create(); !errors.Is(err, class) || err.Error() != "what happened" {
			t.Errorf("%s became %v", code, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.CreateKey(ctx, &adminv1.CreateKeyRequest{}); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled call: %v", err)
	}
}

func TestAdminOutlivesARestartOfTheServer(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	a := &Admin{Socket: socket}
	defer a.Close()
	for range 2 {
		_, stop := serve(t, socket)
		resp, err := a.CreateKey(t.Context(), &adminv1.CreateKeyRequest{Namespace: "a"})
		if err != nil || resp.GetKey() != "key of a" {
			t.Errorf("got %v, %v", resp, err)
		}
		stop()
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		if _, err := a.Status(t.Context()); !errors.Is(err, ErrNotRunning) {
			t.Errorf("a stopped server: %v", err)
		}
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}
}
