package client

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

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
		}}, errdefs.ErrPermissionDenied, JoinGroup()},
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

// The advice to join the group does not assume that the group exists.
func TestJoinGroup(t *testing.T) {
	_, err := user.LookupGroup("msb")
	advice := JoinGroup()
	if strings.Contains(advice, "groupadd") != (err != nil) || !strings.Contains(advice, "sudo usermod -aG msb ") {
		t.Errorf("group msb: %v; got %s", err, advice)
	}
}

// server is an admin service that returns err, or calls its functions.
type server struct {
	adminv1.UnimplementedAdminServiceServer
	err     error
	create  func(*adminv1.CreateKeyRequest) *adminv1.CreateKeyResponse
	list    func(*adminv1.ListKeysRequest) *adminv1.ListKeysResponse
	backup  func(adminv1.AdminService_BackupServer) error
	restore func(adminv1.AdminService_RestoreServer) error
	tail    func(*adminv1.TailAuditRequest, adminv1.AdminService_TailAuditServer) error
}

func (s *server) CreateKey(_ context.Context, req *adminv1.CreateKeyRequest) (*adminv1.CreateKeyResponse, error) {
	if s.create != nil {
		return s.create(req), s.err
	}
	return &adminv1.CreateKeyResponse{Key: "secret", Info: &adminv1.Key{Namespaces: req.GetNamespaces()}}, s.err
}

func (s *server) ListKeys(_ context.Context, req *adminv1.ListKeysRequest) (*adminv1.ListKeysResponse, error) {
	return s.list(req), s.err
}

func (s *server) Backup(_ *adminv1.BackupRequest, stream adminv1.AdminService_BackupServer) error {
	return s.backup(stream)
}

func (s *server) Restore(stream adminv1.AdminService_RestoreServer) error { return s.restore(stream) }

func (s *server) TailAudit(req *adminv1.TailAuditRequest, stream adminv1.AdminService_TailAuditServer) error {
	return s.tail(req, stream)
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
		t.Errorf("a canceled call: %v", err)
	}
}

func TestAdminReconnects(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	a := &Admin{Socket: socket}
	defer a.Close()
	for range 2 {
		_, stop := serve(t, socket)
		resp, err := a.CreateKey(t.Context(), &adminv1.CreateKeyRequest{Namespaces: []string{"a"}})
		if err != nil || resp.GetKey() != "secret" {
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

func newAdmin(t *testing.T) (*server, *Admin) {
	t.Helper()
	dir, err := os.MkdirTemp("", "client") // short, because a socket's path is limited
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, stop := serve(t, filepath.Join(dir, "s"))
	t.Cleanup(stop)
	a := &Admin{Socket: filepath.Join(dir, "s")}
	t.Cleanup(func() { a.Close() })
	return s, a
}

// A server that does not know some of the requested limits creates a key without them. The client must not return
// that key.
func TestCreateKeyDetectsOlderServer(t *testing.T) {
	asked := &adminv1.CreateKeyRequest{Name: "ci", Namespaces: []string{"b", "a", "a"}, Scopes: []string{"y", "x"}}
	for name, tt := range map[string]struct {
		info *adminv1.Key
		ok   bool
	}{
		"as asked":      {&adminv1.Key{Name: "ci", Namespaces: []string{"a", "b"}, Scopes: []string{"x", "y"}}, true},
		"no scopes":     {&adminv1.Key{Name: "ci", Namespaces: []string{"a", "b"}}, false},
		"no namespaces": {&adminv1.Key{Name: "ci", Scopes: []string{"x", "y"}}, false},
		"one namespace": {&adminv1.Key{Name: "ci", Namespaces: []string{"b"}, Scopes: []string{"x", "y"}}, false},
		"more scopes":   {&adminv1.Key{Name: "ci", Namespaces: []string{"a", "b"}, Scopes: []string{"x", "y", "z"}}, false},
		"no name":       {&adminv1.Key{Namespaces: []string{"a", "b"}, Scopes: []string{"x", "y"}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s, a := newAdmin(t)
			s.create = func(*adminv1.CreateKeyRequest) *adminv1.CreateKeyResponse {
				return &adminv1.CreateKeyResponse{Key: "secret", Info: tt.info}
			}
			resp, err := a.CreateKey(t.Context(), asked)
			if tt.ok {
				if err != nil || resp.GetKey() != "secret" {
					t.Errorf("%v, %v", resp, err)
				}
			} else if resp != nil || !errdefs.IsNotImplemented(err) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%v, %v", resp, err)
			}
		})
	}
}

func TestUnimplementedCallReportsOlderServer(t *testing.T) {
	_, a := newAdmin(t)
	if _, err := a.Key(t.Context(), "ci"); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "msbd is older than msb") {
		t.Error(err)
	}
}

func TestKeysComeInPages(t *testing.T) {
	s, a := newAdmin(t)
	s.list = func(req *adminv1.ListKeysRequest) *adminv1.ListKeysResponse {
		if req.GetNamespace() != "a" {
			t.Errorf("got the request %v for a page", req)
		}
		switch req.GetPageToken() {
		case "":
			return &adminv1.ListKeysResponse{Keys: []*adminv1.Key{{Id: "1"}, {Id: "2"}}, NextPageToken: "x"}
		case "x":
			return &adminv1.ListKeysResponse{NextPageToken: "y"} // an empty page that is not the last
		default:
			return &adminv1.ListKeysResponse{Keys: []*adminv1.Key{{Id: "3"}}}
		}
	}
	req := &adminv1.ListKeysRequest{Namespace: "a"}
	for range 2 { // the sequence can be used twice
		var ids string
		for key, err := range a.Keys(t.Context(), req) {
			if err != nil {
				t.Fatal(err)
			}
			ids += key.GetId()
		}
		if ids != "123" {
			t.Errorf("got %s", ids)
		}
	}
	for key := range a.Keys(t.Context(), req) {
		if key.GetId() != "1" {
			t.Error("the sequence continues after a break")
		}
		break
	}
	s.err = status.Error(codes.InvalidArgument, "no")
	n := 0
	for _, err := range a.Keys(t.Context(), req) {
		if n++; !errdefs.IsInvalidArgument(err) || n > 1 {
			t.Error(n, err)
		}
	}
}

// Some lists are sent in one message, which may be larger than gRPC's default limit.
func TestLargeResponses(t *testing.T) {
	s, a := newAdmin(t)
	s.list = func(*adminv1.ListKeysRequest) *adminv1.ListKeysResponse {
		return &adminv1.ListKeysResponse{Keys: []*adminv1.Key{{Id: strings.Repeat("x", 16<<20)}}}
	}
	for _, err := range a.Keys(t.Context(), nil) {
		if err != nil {
			t.Error(err)
		}
	}
}

func TestBackup(t *testing.T) {
	s, a := newAdmin(t)
	var end error
	s.backup = func(stream adminv1.AdminService_BackupServer) error {
		for _, chunk := range []string{"one ", "two"} {
			if err := stream.Send(&adminv1.BackupResponse{Chunk: []byte(chunk)}); err != nil {
				return err
			}
		}
		return end
	}
	var got strings.Builder
	if err := a.Backup(t.Context(), &got); err != nil || got.String() != "one two" {
		t.Errorf("%q, %v", got.String(), err)
	}
	end = status.Error(codes.FailedPrecondition, "the disk is full")
	if err := a.Backup(t.Context(), io.Discard); !errdefs.IsFailedPrecondition(err) || err.Error() != "the disk is full" {
		t.Errorf("a backup that was cut off: %v", err)
	}
	broken := errors.New("no space")
	if err := a.Backup(t.Context(), failingWriter{broken}); err != broken {
		t.Errorf("a backup that cannot be written: %v", err)
	}
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

func TestRestore(t *testing.T) {
	s, a := newAdmin(t)
	content := strings.Repeat("archive ", 100_000)
	type upload struct {
		content string
		err     error
	}
	uploads := make(chan upload, 1)
	s.restore = func(stream adminv1.AdminService_RestoreServer) error {
		var u upload
		for {
			req, err := stream.Recv()
			if err == io.EOF {
				uploads <- u
				return stream.SendAndClose(&adminv1.RestoreResponse{Live: 3})
			}
			if err != nil {
				u.err = err
				uploads <- u
				return err
			}
			u.content += string(req.GetChunk())
		}
	}
	// The complete archive arrives, however the reader splits it.
	for name, r := range map[string]io.Reader{
		"at once":         strings.NewReader(content),
		"in halves":       iotest.HalfReader(strings.NewReader(content)),
		"data with error": iotest.DataErrReader(strings.NewReader(content)),
	} {
		resp, err := a.Restore(t.Context(), r)
		if u := <-uploads; err != nil || resp.GetLive() != 3 || u.content != content {
			t.Errorf("%s: %v, %v, %d of %d bytes", name, resp, err, len(u.content), len(content))
		}
	}
	// An archive that cannot be read to the end is not restored.
	unreadable := errors.New("bad sector")
	if _, err := a.Restore(t.Context(), io.MultiReader(strings.NewReader("half"), iotest.ErrReader(unreadable))); !errors.Is(err, unreadable) {
		t.Errorf("got %v", err)
	}
	if u := <-uploads; u.err == nil {
		t.Error("the server takes half of the archive for a complete one")
	}
	// The server can refuse early.
	s.restore = func(adminv1.AdminService_RestoreServer) error { return status.Error(codes.DataLoss, "damaged") }
	if _, err := a.Restore(t.Context(), strings.NewReader(strings.Repeat(content, 10))); !errdefs.IsDataLoss(err) || err.Error() != "damaged" {
		t.Errorf("got %v", err)
	}
}

func TestTailAudit(t *testing.T) {
	s, a := newAdmin(t)
	ended := make(chan struct{})
	s.tail = func(req *adminv1.TailAuditRequest, stream adminv1.AdminService_TailAuditServer) error {
		for range req.GetLast() {
			if err := stream.Send(&adminv1.TailAuditResponse{Line: "line"}); err != nil {
				return err
			}
		}
		if !req.GetFollow() {
			return nil
		}
		<-stream.Context().Done()
		close(ended)
		return stream.Context().Err()
	}
	n := 0
	count := func(line string) error {
		if n++; line != "line" {
			t.Errorf("got %q", line)
		}
		return nil
	}
	if err := a.TailAudit(t.Context(), 3, false, count); err != nil || n != 3 {
		t.Errorf("%d lines, %v", n, err)
	}
	// An error of the callback ends the stream on the server.
	enough := errors.New("enough")
	if err := a.TailAudit(t.Context(), 1, true, func(string) error { return enough }); err != enough {
		t.Error(err)
	}
	<-ended
}

func TestDefaultSocket(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", dir)
	own := filepath.Join(dir, "msb", "msbd.sock")
	if err := os.Mkdir(filepath.Dir(own), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(own, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want := own
	if os.Geteuid() == 0 {
		want = systemSocket
	}
	if got := DefaultSocket(); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	t.Setenv("XDG_RUNTIME_DIR", "")
	if got := DefaultSocket(); got != systemSocket {
		t.Errorf("without XDG_RUNTIME_DIR: %s", got)
	}
}
