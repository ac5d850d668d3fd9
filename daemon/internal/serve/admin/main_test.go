package admin

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/msbd/msbd/api/audit"
	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/keys/keystest"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/peer"
)

// store is a keys.Store and an Audit in memory.
type store struct {
	*keystest.MemoryStore
	mu      sync.Mutex
	more    chan struct{} // closed and replaced with each change
	problem error         // of the audit log
}

func newStore() *store {
	return &store{MemoryStore: keystest.NewMemoryStore(), more: make(chan struct{})}
}

func (s *store) CommitKeys(c keys.Change) error {
	if err := s.MemoryStore.CommitKeys(c); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.more)
	s.more = make(chan struct{})
	return nil
}

func (s *store) Audit(e audit.Event) error {
	return s.CommitKeys(keys.Change{Events: []audit.Event{e}})
}

func (s *store) AuditPath() string { return "/state/audit.jsonl" }

func (s *store) VerifyAudit(ctx context.Context) (audit.Head, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return audit.Head{Seq: uint64(len(s.Events())), Hash: "h"}, s.problem
}

func (s *store) TailAudit(ctx context.Context, last int, follow bool, line func([]byte) error) error {
	next := max(0, len(s.Events())-last)
	for {
		s.mu.Lock()
		more := s.more
		s.mu.Unlock()
		events := s.Events()[next:]
		next += len(events)
		for _, e := range events {
			if err := line([]byte(e.Action)); err != nil {
				return err
			}
		}
		if !follow {
			return nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// archives is a Backups whose archive is some bytes.
type archives struct {
	content string
	by      uint32
	err     error
	// restored has what each Restore read, or why it could not.
	restored chan error
	read     string
}

func (a *archives) Write(_ context.Context, w io.Writer, by uint32) error {
	a.by = by
	if _, err := io.WriteString(w, a.content); err != nil {
		return err
	}
	return a.err
}

func (a *archives) Restore(_ context.Context, r io.Reader, by uint32) (keys.Restored, error) {
	a.by = by
	content, err := io.ReadAll(r)
	a.read = string(content)
	a.restored <- err
	return keys.Restored{TakenAt: time.Unix(9, 0), Live: 2, Invalidated: 1}, errors.Join(err, a.err)
}

type sandboxes struct {
	records []sandbox.Record
	stopped []sandbox.Name
}

func (s *sandboxes) List(namespace string) (out []sandbox.Record) {
	for _, r := range s.records {
		if namespace == "" || r.Name.Namespace == namespace {
			out = append(out, r)
		}
	}
	return out
}

func (s *sandboxes) StopAll(context.Context) (int, error) {
	n := len(s.records)
	s.records = nil
	return n, nil
}

func (s *sandboxes) Stop(_ context.Context, name sandbox.Name) error {
	s.stopped = append(s.stopped, name)
	return nil
}

type images struct {
	list     []sandbox.Image
	imported []string
}

func (i *images) Import(_ context.Context, path string) ([]sandbox.Image, error) {
	i.imported = append(i.imported, path)
	return i.list, nil
}

func (i *images) List(context.Context) ([]sandbox.Image, error) { return i.list, nil }

// log is a log that may be read while it is written.
type log struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

type fixture struct {
	client    adminv1.AdminServiceClient
	conn      *grpc.ClientConn
	stop      func() error // ends the server and waits for it
	server    *Server
	shutdowns int
	statuses  int
	state     adminv1.GetStatusResponse_DaemonState
	peer      peer.Peer
	peerKnown bool
	verifier  *keys.Verifier
	store     *store
	archives  *archives
	sandboxes *sandboxes
	images    *images
	log       log
}

// newFixture serves an AdminService over real API keys, on a socket; the caller is root until told
// otherwise.
func newFixture(t *testing.T, group string) *fixture {
	t.Helper()
	f := &fixture{
		state:     adminv1.GetStatusResponse_DAEMON_STATE_READY,
		peerKnown: true,
		store:     newStore(),
		archives:  &archives{restored: make(chan error, 1)},
		sandboxes: new(sandboxes),
		images: &images{list: []sandbox.Image{{
			Name: "microsandbox/python", Digest: "sha256:00", Size: 7, Created: time.Unix(1, 0),
		}}},
	}
	log := slog.New(slog.NewTextHandler(&f.log, nil))
	issuer, verifier, err := keys.Open(keys.Options{
		KeyringPath: t.TempDir() + "/keys/keyring.json", Store: f.store, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	f.verifier = verifier
	f.server = New(Options{
		Keys:      issuer,
		Pruner:    issuer,
		Audit:     f.store,
		Backups:   f.archives,
		Sandboxes: f.sandboxes,
		Images:    f.images,
		State:     func() (adminv1.GetStatusResponse_DaemonState, []string) { return f.state, []string{"no disk"} },
		Status: func() *adminv1.GetStatusResponse {
			f.statuses++
			return &adminv1.GetStatusResponse{State: f.state, DegradedReasons: []string{"no disk"}}
		},
		Shutdown:    func() { f.shutdowns++ },
		Credentials: insecure.NewCredentials(),
		PeerOf:      func(context.Context) (peer.Peer, bool) { return f.peer, f.peerKnown },
		Group:       group,
		Log:         log,
	})
	dir, err := os.MkdirTemp("", "admin") // short, because a socket's path is limited
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- f.server.Serve(ctx, l) }()
	f.conn, err = grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	f.stop = sync.OnceValue(func() error {
		cancel()
		return <-served
	})
	t.Cleanup(func() {
		f.conn.Close()
		if err := f.stop(); err != nil {
			t.Error(err)
		}
	})
	f.client = adminv1.NewAdminServiceClient(f.conn)
	return f
}

// call makes a call of a method by name, streaming or not, with one empty request.
func (f *fixture) call(t *testing.T, method string) codes.Code {
	t.Helper()
	stream, err := f.conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		t.Fatal(err)
	}
	// An empty message is valid on the wire for every request and response. A send fails with what the
	// call ended with, which is received, too.
	_ = stream.SendMsg(&adminv1.ResetRequest{})
	_ = stream.CloseSend()
	for {
		if err := stream.RecvMsg(&adminv1.ResetResponse{}); err == io.EOF {
			return codes.OK
		} else if err != nil {
			return status.Code(err)
		}
	}
}

// served is every method of the service, by its full name.
func served() (list []string) {
	desc := adminv1.AdminService_ServiceDesc
	for _, m := range desc.Methods {
		list = append(list, "/"+desc.ServiceName+"/"+m.MethodName)
	}
	for _, s := range desc.Streams {
		list = append(list, "/"+desc.ServiceName+"/"+s.StreamName)
	}
	return list
}
