package admin

import (
	"context"
	"errors"
	"fmt"
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

// memoryStore is an in-memory keys.Store and Audit.
type memoryStore struct {
	*keystest.MemoryStore
	mu       sync.Mutex
	changed  chan struct{} // closed and replaced on each change
	auditErr error         // returned by VerifyAudit
}

func newStore() *memoryStore {
	return &memoryStore{MemoryStore: keystest.NewMemoryStore(), changed: make(chan struct{})}
}

func (s *memoryStore) CommitKeys(c keys.Change) error {
	if err := s.MemoryStore.CommitKeys(c); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changed)
	s.changed = make(chan struct{})
	return nil
}

func (s *memoryStore) Audit(e audit.Event) error {
	return s.CommitKeys(keys.Change{Events: []audit.Event{e}})
}

func (s *memoryStore) AuditPath() string { return "/state/audit.jsonl" }

func (s *memoryStore) VerifyAudit(ctx context.Context) (audit.Head, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return audit.Head{Seq: uint64(len(s.Events())), Hash: "h"}, s.auditErr
}

func (s *memoryStore) AuditSegments() []audit.Segment {
	return []audit.Segment{{Path: "/state/audit-1-2.jsonl", First: 1, Last: audit.Head{Seq: 2, Hash: "g"}, Absent: true}}
}

func (s *memoryStore) SealAudit(_ context.Context, actor string) (audit.Segment, error) {
	if err := s.Audit(audit.Event{Action: audit.LogSeal, Actor: actor}); err != nil {
		return audit.Segment{}, err
	}
	return s.AuditSegments()[0], nil
}

func (s *memoryStore) AcknowledgeAudit(_ context.Context, by uint32) ([]string, error) {
	return []string{"the audit log was altered"}, s.Audit(audit.Event{Action: audit.LogAcknowledge, Actor: audit.ActorUID(by)})
}

func (s *memoryStore) TailAudit(ctx context.Context, last int, follow bool, line func([]byte) error) error {
	next := max(0, len(s.Events())-last)
	for {
		s.mu.Lock()
		changed := s.changed
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
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// fakeBackups is a Backups whose archives are arbitrary text.
type fakeBackups struct {
	content string // what Write writes
	by      uint32
	err     error
	// restored gets the error of reading the archive, for each Restore.
	restored chan error
	read     string // what the last Restore read
}

func (b *fakeBackups) Write(_ context.Context, w io.Writer, by uint32) error {
	b.by = by
	if _, err := io.WriteString(w, b.content); err != nil {
		return err
	}
	return b.err
}

func (b *fakeBackups) Restore(_ context.Context, r io.Reader, by uint32) (keys.Restored, error) {
	b.by = by
	content, err := io.ReadAll(r)
	b.read = string(content)
	b.restored <- err
	return keys.Restored{TakenAt: time.Unix(9, 0), Live: 2, Invalidated: 1}, errors.Join(err, b.err)
}

type fakeSandboxes struct {
	records  []sandbox.Record
	stopped  []sandbox.Name
	pool     sandbox.PoolStatus
	poolSets []string // the arguments of SetPool
	poolErr  error

	onStop func() // if set, called by Stop and StopAll
}

func (s *fakeSandboxes) List(namespace string) (out []sandbox.Record) {
	for _, r := range s.records {
		if namespace == "" || r.Name.Namespace == namespace {
			out = append(out, r)
		}
	}
	return out
}

func (s *fakeSandboxes) PoolStatus() sandbox.PoolStatus { return s.pool }

func (s *fakeSandboxes) SetPool(_ context.Context, req sandbox.Request, least, most int) (sandbox.PoolSize, error) {
	s.poolSets = append(s.poolSets, fmt.Sprintf("%+v %d %d", req, least, most))
	return sandbox.PoolSize{Template: sandbox.Template{Image: req.Image, CPUs: 1, MemoryMiB: 512, DiskMiB: 4096}, Min: least, Max: most}, s.poolErr
}

func (s *fakeSandboxes) StopAll(context.Context) (int, error) {
	n := len(s.records)
	s.records = nil
	if s.onStop != nil {
		s.onStop()
	}
	return n, nil
}

func (s *fakeSandboxes) Stop(_ context.Context, name sandbox.Name) error {
	s.stopped = append(s.stopped, name)
	if s.onStop != nil {
		s.onStop()
	}
	return nil
}

type fakeImages struct {
	list     []sandbox.Image
	imported []string
	removed  []string
	seen     []sandbox.Record // the sandboxes that the last Remove was given
	err      error            // of Import and Remove
	// onImport, which may be nil, is called by Import.
	onImport func(progress func(sandbox.ImportProgress))
}

func (i *fakeImages) Import(_ context.Context, path string, progress func(sandbox.ImportProgress)) ([]sandbox.Image, error) {
	i.imported = append(i.imported, path)
	if i.onImport != nil {
		i.onImport(progress)
	}
	if i.err != nil {
		return nil, i.err
	}
	return i.list, nil
}

func (i *fakeImages) List(context.Context) ([]sandbox.Image, error) { return i.list, nil }

func (i *fakeImages) Remove(_ context.Context, name string, sandboxes []sandbox.Record) error {
	i.removed, i.seen = append(i.removed, name), sandboxes
	return i.err
}

// logBuffer is a buffer that can be read while it is written.
type logBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

type fixture struct {
	client    adminv1.AdminServiceClient
	conn      *grpc.ClientConn
	stop      func() error // stops the server and waits for it
	server    *Server
	shutdowns int
	statuses  int
	state     adminv1.GetStatusResponse_DaemonState
	peer      peer.Peer
	peerKnown bool
	verifier  *keys.Verifier
	store     *memoryStore
	backups   *fakeBackups
	sandboxes *fakeSandboxes
	images    *fakeImages
	log       logBuffer
}

// newFixture serves an AdminService with real API keys on a Unix socket. The caller is root unless a test sets f.peer.
func newFixture(t *testing.T, group string) *fixture {
	t.Helper()
	f := &fixture{
		state:     adminv1.GetStatusResponse_DAEMON_STATE_READY,
		peerKnown: true,
		store:     newStore(),
		backups:   &fakeBackups{restored: make(chan error, 1)},
		sandboxes: new(fakeSandboxes),
		images: &fakeImages{list: []sandbox.Image{{
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
		MakeRoom:  func() bool { return false },
		Backups:   f.backups,
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
	dir, err := os.MkdirTemp("", "admin") // t.TempDir may be too long for the path of a socket
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

// call calls a method, streaming or not, with one empty request, and returns the status code.
func (f *fixture) call(t *testing.T, method string) codes.Code {
	t.Helper()
	stream, err := f.conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		t.Fatal(err)
	}
	// An empty message is valid on the wire as any request and any response. If the call has already ended, sending fails,
	// but RecvMsg returns its status as well.
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

// serviceMethods returns the full name of every method of the service.
func serviceMethods() (list []string) {
	desc := adminv1.AdminService_ServiceDesc
	for _, m := range desc.Methods {
		list = append(list, "/"+desc.ServiceName+"/"+m.MethodName)
	}
	for _, s := range desc.Streams {
		list = append(list, "/"+desc.ServiceName+"/"+s.StreamName)
	}
	return list
}
