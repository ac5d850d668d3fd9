// Package admin serves the admin socket's gRPC API: each method is a few lines over the domains of keys
// and sandboxes. Its interceptor decides, by one table, who may call what and when. Only package daemon
// imports this package.
package admin

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/msbd/msbd/api/audit"
	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/peer"
)

// Keys issues API keys. A *keys.Issuer is one.
type Keys interface {
	Issue(ctx context.Context, req keys.IssueRequest) (keys.Secret, keys.Record, error)
	List(f keys.Filter, after string, limit int) (keys []keys.Key, next string, err error)
	Find(ref string) (keys.Key, error)
	Revoke(ctx context.Context, ref string, by uint32) (keys.Key, error)
	Rotate(ctx context.Context, req keys.RotateRequest) (secret keys.Secret, made keys.Record, old keys.Key, err error)
	Reset(ctx context.Context, by uint32) (invalidated int, err error)
	SigningKey() keys.SigningKey
	// Now is the time by which keys live and die.
	Now() time.Time
}

// Pruner removes dead keys. A *backup.Service is one: it removes none that a restore could bring back.
type Pruner interface {
	// Prune removes the keys that have been dead for so long or, with dryRun, only returns them.
	Prune(ctx context.Context, deadFor string, dryRun bool, by uint32) ([]keys.Key, error)
}

// Audit is the audit log. A *store.Store is one.
type Audit interface {
	// Audit adds an event; when it returns nil, the entry is durable.
	Audit(e audit.Event) error
	AuditPath() string
	// VerifyAudit returns the head of what is good and, when that is not all, an error.
	VerifyAudit(ctx context.Context) (audit.Head, error)
	// TailAudit calls line with each of the last entries and, with follow, with each new one.
	TailAudit(ctx context.Context, last int, follow bool, line func([]byte) error) error
}

// Backups writes and reads archives of the keys. A *backup.Service is one.
type Backups interface {
	// Write writes an archive; by is the uid of the local user who asks.
	Write(ctx context.Context, w io.Writer, by uint32) error
	// Restore reads one, and changes nothing unless all of it is good.
	Restore(ctx context.Context, r io.Reader, by uint32) (keys.Restored, error)
}

// Sandboxes lists and stops sandboxes. A *sandbox.Manager is one.
type Sandboxes interface {
	// List returns the sandboxes of one tenant namespace, or of all if it is empty.
	List(namespace string) []sandbox.Record
	Stop(ctx context.Context, name sandbox.Name) error
	// StopAll stops every sandbox and says how many.
	StopAll(ctx context.Context) (int, error)
}

// Images holds what sandboxes can be started from. An *image.Store is one.
type Images interface {
	// Import reads an OCI archive on this host.
	Import(ctx context.Context, path string) ([]sandbox.Image, error)
	List(ctx context.Context) ([]sandbox.Image, error)
}

// Options is what a Server is made of.
type Options struct {
	Keys      Keys
	Pruner    Pruner
	Audit     Audit
	Backups   Backups
	Sandboxes Sandboxes
	Images    Images
	// State is how the daemon is, and why it is degraded if it is. It is called in every state, at each
	// call, and must not block.
	State func() (state adminv1.GetStatusResponse_DaemonState, reasons []string)
	// Status describes the daemon in full. It is called in every state and must not block.
	Status func() *adminv1.GetStatusResponse
	// Shutdown makes the daemon end, and with it the context of Serve. It does not wait.
	Shutdown func()
	// Credentials read who is at the other end of a connection, and PeerOf returns who made a call:
	// peer.Credentials and peer.FromContext.
	Credentials credentials.TransportCredentials
	PeerOf      func(ctx context.Context) (peer.Peer, bool)
	// Group is the Unix group whose members may do everything here, beside root and the daemon's own
	// user. The host need not have it.
	Group string
	Log   *slog.Logger
}

// Server implements the AdminService.
type Server struct {
	adminv1.UnimplementedAdminServiceServer
	Options
}

// New makes a Server.
func New(o Options) *Server { return &Server{Options: o} }

// drainTimeout is how long calls in progress may go on when the daemon ends. Streams that only tell,
// which may go on for ever, end at once.
const drainTimeout = 5 * time.Second

// Serve answers calls on l until ctx ends, then lets those in progress finish, and closes l. It can be
// called before the daemon is ready: only what State says is ready is served.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	g := grpc.NewServer(
		grpc.Creds(s.Credentials),
		grpc.UnaryInterceptor(s.intercept),
		grpc.StreamInterceptor(s.interceptStream(ctx)),
		grpc.MaxRecvMsgSize(1<<20))
	adminv1.RegisterAdminServiceServer(g, s)
	drained := make(chan struct{})
	stopDraining := context.AfterFunc(ctx, func() {
		defer close(drained)
		limit := time.AfterFunc(drainTimeout, g.Stop)
		defer limit.Stop()
		g.GracefulStop()
	})
	err := g.Serve(l)
	if stopDraining() {
		return fmt.Errorf("serve admin socket: %w", err) // nobody asked it to end
	}
	<-drained
	return nil
}

// GetStatus implements AdminServiceServer.
func (s *Server) GetStatus(context.Context, *adminv1.GetStatusRequest) (*adminv1.GetStatusResponse, error) {
	return s.Status(), nil
}

// Shutdown implements AdminServiceServer. If a sandbox cannot be stopped, the daemon stays.
func (s *Server) Shutdown(ctx context.Context, req *adminv1.ShutdownRequest) (*adminv1.ShutdownResponse, error) {
	var detail map[string]string
	if req.GetStopSandboxes() {
		detail = map[string]string{"sandboxes": "stopped"}
	}
	if err := s.record(ctx, audit.Event{Action: audit.ServerStop, Detail: detail}); err != nil {
		return nil, fmt.Errorf("msbd was not stopped ('systemctl stop msbd', or SIGTERM to process %d, does it all the same): %w", os.Getpid(), err)
	}
	var stopped int
	if req.GetStopSandboxes() {
		var err error
		if stopped, err = s.Sandboxes.StopAll(ctx); err != nil {
			return nil, err
		}
	}
	running := 0
	for _, r := range s.Sandboxes.List("") {
		if r.State != sandbox.Failed {
			running++
		}
	}
	s.Options.Shutdown()
	return &adminv1.ShutdownResponse{SandboxesStopped: int32(stopped), SandboxesLeftRunning: int32(running)}, nil
}

// uid is the local user who makes a call; the interceptor has made sure that there is one.
func (s *Server) uid(ctx context.Context) uint32 {
	peer, _ := s.PeerOf(ctx)
	return peer.UID
}

// record puts what the caller is about to do into the audit log. What cannot be recorded is not done.
func (s *Server) record(ctx context.Context, e audit.Event) error {
	e.Actor = audit.ActorUID(s.uid(ctx))
	if err := s.Audit.Audit(e); err != nil {
		return fmt.Errorf("record it in the audit log, without which it is not done: %w", err)
	}
	return nil
}
