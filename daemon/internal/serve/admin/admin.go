// Package admin serves the gRPC API of the admin socket. Each method is a thin layer over the domains of keys and
// sandboxes. An interceptor checks the caller of every call, and a single table says in which states of the daemon each
// method is served. Only package daemon imports this package.
package admin

import (
	"context"
	"errors"
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

// Keys manages API keys. *keys.Issuer implements it.
type Keys interface {
	Issue(ctx context.Context, req keys.IssueRequest) (keys.Secret, keys.Record, error)
	List(f keys.Filter, after string, limit int) (keys []keys.Key, next string, err error)
	Find(ref string) (keys.Key, error)
	Revoke(ctx context.Context, ref string, by uint32) (keys.Key, error)
	Rotate(ctx context.Context, req keys.RotateRequest) (secret keys.Secret, created keys.Record, old keys.Key, err error)
	// AcceptClock makes the server use the time of the wall clock. With dryRun, it only returns what would change.
	AcceptClock(ctx context.Context, dryRun bool, by uint32) (keys.ClockChange, error)
	Reset(ctx context.Context, by uint32) (invalidated int, err error)
	SigningKey() keys.SigningKey
	// Now returns the time that decides whether a key has expired.
	Now() time.Time
}

// Pruner removes dead keys. *backup.Service implements it: it keeps dead keys that restoring a backup could make valid
// again.
type Pruner interface {
	// Prune removes the keys that have been dead for at least the duration deadFor, and returns them. With dryRun, it
	// only returns them.
	Prune(ctx context.Context, deadFor string, dryRun bool, by uint32) ([]keys.Key, error)
}

// Audit is the audit log. *store.Store implements it.
type Audit interface {
	// Audit appends an event. Once it returns nil, the entry is durable.
	Audit(e audit.Event) error
	AuditPath() string
	// VerifyAudit returns the last entry of the intact part of the log, and an error if that is not the complete log.
	VerifyAudit(ctx context.Context) (audit.Head, error)
	// AuditSegments returns the sealed segments of the log.
	AuditSegments() []audit.Segment
	// SealAudit seals the current file of the log, for actor.
	SealAudit(ctx context.Context, actor string) (audit.Segment, error)
	// AcknowledgeAudit forgets the known problems of the log, which it returns, for the local user by.
	AcknowledgeAudit(ctx context.Context, by uint32) (problems []string, err error)
	// TailAudit calls line with each of the last entries and, with follow, with each new one.
	TailAudit(ctx context.Context, last int, follow bool, line func([]byte) error) error
}

// Backups writes and restores archives of the keys. *backup.Service implements it.
type Backups interface {
	// Write writes an archive to w. by is the uid of the local user who requested it.
	Write(ctx context.Context, w io.Writer, by uint32) error
	// Restore reads an archive from r. Unless the complete archive is valid, it changes nothing.
	Restore(ctx context.Context, r io.Reader, by uint32) (keys.Restored, error)
}

// Sandboxes lists and stops sandboxes. *sandbox.Manager implements it.
type Sandboxes interface {
	// List returns the sandboxes of a tenant namespace, or of all namespaces if namespace is empty.
	List(namespace string) []sandbox.Record
	Stop(ctx context.Context, name sandbox.Name) error
	// StopAll stops every sandbox and returns how many it stopped.
	StopAll(ctx context.Context) (int, error)
	PoolStatus() sandbox.PoolStatus
	// SetPool sets the size of the pool of a template.
	SetPool(ctx context.Context, req sandbox.Request, least, most int) (sandbox.PoolSize, error)
}

// Images manages the images from which sandboxes are started. *image.Store implements it.
type Images interface {
	// Import imports the OCI archive at a path on this host. It calls progress, which must not block, as it proceeds.
	Import(ctx context.Context, path string, progress func(sandbox.ImportProgress)) ([]sandbox.Image, error)
	List(ctx context.Context) ([]sandbox.Image, error)
	// Remove removes an image, unless one of the sandboxes uses it.
	Remove(ctx context.Context, name string, sandboxes []sandbox.Record) error
}

// Options are the dependencies of a Server. All are required.
type Options struct {
	Keys      Keys
	Pruner    Pruner
	Audit     Audit
	Backups   Backups
	Sandboxes Sandboxes
	Images    Images
	// MakeRoom frees disk space from a reserve if the disk is full. It reports whether it did.
	MakeRoom func() bool
	// State returns the state of the daemon and, if it is degraded, the reasons. It is called for each call, in every
	// state, and must not block.
	State func() (state adminv1.GetStatusResponse_DaemonState, reasons []string)
	// Status returns the complete status of the daemon. It is called in every state and must not block.
	Status func() *adminv1.GetStatusResponse
	// Shutdown makes the daemon exit, which cancels the context of Serve. It does not wait.
	Shutdown func()
	// Credentials reads the peer credentials of a connection, and PeerOf returns those of the caller of a call. They are
	// peer.Credentials and peer.FromContext.
	Credentials credentials.TransportCredentials
	PeerOf      func(ctx context.Context) (peer.Peer, bool)
	// Group is the Unix group whose members may call every method, as may root and the user who runs the daemon. The
	// group need not exist on the host.
	Group string
	Log   *slog.Logger
}

// Server implements the AdminService. Create it with New.
type Server struct {
	adminv1.UnimplementedAdminServiceServer
	Options
}

// New returns a Server.
func New(o Options) *Server { return &Server{Options: o} }

// drainTimeout is how long calls in progress may take to finish when the daemon stops. Streams of read methods, which may
// be endless, are ended immediately.
const drainTimeout = 5 * time.Second

// Serve serves calls on l until ctx is canceled. Then it waits for calls in progress and closes l. It can be called
// before the daemon is ready: until then, it serves only the methods that State permits.
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
		return fmt.Errorf("serve admin socket: %w", err) // ctx is not canceled, so the listener has failed
	}
	<-drained
	return nil
}

// GetStatus implements AdminServiceServer.
func (s *Server) GetStatus(context.Context, *adminv1.GetStatusRequest) (*adminv1.GetStatusResponse, error) {
	return s.Status(), nil
}

// Shutdown implements AdminServiceServer. If a sandbox cannot be stopped, the daemon keeps running.
func (s *Server) Shutdown(ctx context.Context, req *adminv1.ShutdownRequest) (*adminv1.ShutdownResponse, error) {
	var (
		stopped int
		err     error
	)
	if req.GetStopSandboxes() {
		e := audit.Event{Action: audit.ServerStop, Detail: map[string]string{"sandboxes": "stopped"}}
		err = s.recordStop(ctx, e, func() (err error) {
			stopped, err = s.Sandboxes.StopAll(ctx)
			return err
		})
	} else if err = s.record(ctx, audit.Event{Action: audit.ServerStop}); err != nil {
		err = fmt.Errorf("msbd was not stopped; to stop it without an audit entry, use 'systemctl stop msbd' or send SIGTERM to process %d: %w", os.Getpid(), err)
	}
	if err != nil {
		return nil, err
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

// uid returns the uid of the caller. The interceptor has checked that it is known.
func (s *Server) uid(ctx context.Context) uint32 {
	peer, _ := s.PeerOf(ctx)
	return peer.UID
}

// record writes an event to the audit log, with the caller as its actor. Call it before performing the operation, and do
// not perform the operation if it fails.
func (s *Server) record(ctx context.Context, e audit.Event) error {
	e.Actor = audit.ActorUID(s.uid(ctx))
	if err := s.Audit.Audit(e); err != nil {
		return fmt.Errorf("write the audit entry (the operation was not performed): %w", err)
	}
	return nil
}

// recordStop records e and calls stop, which stops sandboxes. If the entry cannot be written, it calls stop nevertheless,
// because that may be the only way to free the disk, and then tries to write the entry again. If that fails as well, it
// returns an error, so that the missing entry is noticed.
func (s *Server) recordStop(ctx context.Context, e audit.Event, stop func() error) error {
	e.Actor = audit.ActorUID(s.uid(ctx))
	recordErr := s.Audit.Audit(e)
	if err := stop(); err != nil {
		return errors.Join(err, recordErr)
	}
	if recordErr == nil {
		return nil
	}
	if err := s.Audit.Audit(e); err != nil {
		return fmt.Errorf("the sandboxes were stopped, but that is not in the audit log: %w", err)
	}
	return nil
}
