// Package daemontest is a fake msbd for tests of its clients. The gateway, the admin server, the API keys, the store with
// its audit log, the backups and the Manager are the real ones; only the microVMs are the fakes of sandboxtest. trouble.go
// fakes the kinds of trouble that a test cannot cause in the real parts. Only tests import this package.
package daemontest

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/msbd/msbd/api/audit"
	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/data/backup"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/admin"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/localsock"
	"github.com/msbd/msbd/daemon/internal/serve/mcp"
	"github.com/msbd/msbd/daemon/internal/serve/rpc"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/serve/stream"
	"github.com/msbd/msbd/daemon/internal/sys/config"
	"github.com/msbd/msbd/daemon/internal/sys/peer"
)

// SmallNamespace is a tenant namespace with a quota of one sandbox.
const SmallNamespace = "small"

// Server is a fake msbd, without real microVMs.
type Server struct {
	// Runs receives each run when it starts. It holds only the last run that was not received.
	Runs chan Run

	cfg       config.Config
	trouble   Trouble
	portals   *portals // nil if the sandboxes are fakes
	startedAt time.Time
	log       *slog.Logger

	store        *store.Store
	httpListener net.Listener
	socket       net.Listener
	issuer       *keys.Issuer
	backups      *backup.Service
	manager      *sandbox.Manager
	recovery     sandbox.Recovery
	gateway      *gateway.Gateway

	serving context.Context // canceled when the server must stop
	stop    context.CancelFunc
	stopped chan error // receives the result of serve
}

// Run is a run of code or of a command, as its sandbox received it.
type Run struct {
	// Asked is the sandbox.Code or sandbox.Command, as JSON.
	Asked string
	// Ended is closed when the run has ended by itself or was interrupted.
	Ended <-chan struct{}
}

// Start starts a server with its state and its admin socket in dir, and its gateway on a free port.
func Start(dir string) (*Server, error) { return start(dir, nil) }

// StartWithPortals is like Start, but the sandboxes run real programs on this host, with all of its rights. Each starts in a
// directory of its own, below dir. Runs receives nothing.
func StartWithPortals(dir string) (*Server, error) { return start(dir, newPortals(dir)) }

// start starts a server whose sandboxes are those of portals, or fakes if portals is nil.
func start(dir string, portals *portals) (*Server, error) {
	cfg := config.Default()
	cfg.StateDir, cfg.RunDir, cfg.Listen = filepath.Join(dir, "state"), filepath.Join(dir, "run"), "127.0.0.1:0"
	cfg.MaxCPUs, cfg.MaxMemoryMiB, cfg.TotalSandboxes = 2, 16<<10, 100
	cfg.PoolMin = 0
	cfg.Quotas = map[string]config.Quota{SmallNamespace: {Sandboxes: 1}}
	s, err := open(context.Background(), cfg, "", nil, portals, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	s.stopped = make(chan error, 1)
	go func() { s.stopped <- s.serve() }()
	return s, nil
}

// Close stops a server that was started with Start, and returns the error that it ended with.
func (s *Server) Close() error {
	s.stop()
	return <-s.stopped
}

// URL returns the base URL of the gateway.
func (s *Server) URL() string { return "http://" + s.httpListener.Addr().String() }

// Handler returns the gateway, so that a test can serve it on its own listener.
func (s *Server) Handler() http.Handler { return s.gateway }

// Key creates an API key with all scopes. It is limited to namespaces if there are any.
func (s *Server) Key(namespaces ...string) (string, error) {
	secret, _, err := s.issuer.Issue(context.Background(), keys.IssueRequest{Namespaces: namespaces})
	return secret.Reveal(), err
}

// ScopedKey creates an API key that has only these scopes.
func (s *Server) ScopedKey(scopes ...keys.Scope) (string, error) {
	secret, _, err := s.issuer.Issue(context.Background(), keys.IssueRequest{Scopes: scopes})
	return secret.Reveal(), err
}

// Sandboxes returns the records of all sandboxes as JSON.
func (s *Server) Sandboxes() string { return inJSON(s.manager.List("")) }

func inJSON(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // cannot happen: callers pass only types of this project
	}
	return string(text)
}

// open creates a server, in the same order as package daemon. If the state directory has no sandboxes, the server starts
// with those in initial. Its sandboxes are those of portals, or fakes if portals is nil.
func open(
	ctx context.Context, cfg config.Config, trouble Trouble, initial []sandbox.Record, portals *portals, log *slog.Logger,
) (s *Server, err error) {
	s = &Server{Runs: make(chan Run, 1), cfg: cfg, trouble: trouble, portals: portals, startedAt: time.Now(), log: log}
	s.serving, s.stop = context.WithCancel(ctx)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.store, err = store.Open(cfg.StateDir); err != nil {
		return s, err
	}
	if s.httpListener, err = net.Listen("tcp", cfg.Listen); err != nil {
		return s, err
	}
	if s.socket, err = localsock.Listen(cfg.SocketPath()); err != nil {
		return s, err
	}
	if trouble == ClockAhead {
		if err := s.store.SaveUsage(nil, s.startedAt.Add(24*time.Hour)); err != nil {
			return s, err
		}
	}
	issuer, verifier, err := keys.Open(keys.Options{
		KeyringPath: filepath.Join(cfg.StateDir, "keyring.json"), Store: s.store, Reset: cfg.ResetKey, Log: log,
	})
	if err != nil {
		return s, err
	}
	s.issuer = issuer
	s.backups = backup.New(backup.Options{Dir: cfg.StateDir, Keys: issuer, Store: s.store, ReadKeys: store.ReadKeys, Log: log})
	if err := s.openSandboxes(initial); err != nil {
		return s, err
	}
	metrics := prometheus.NewRegistry()
	methods, err := rpc.New(s.manager, version, metrics)
	if err != nil {
		return s, err
	}
	mcpHandler, err := mcp.New(methods, version)
	if err != nil {
		return s, err
	}
	s.gateway, err = gateway.New(gateway.Options{
		Verifier: verifier, Endpoints: slices.Concat(methods.Endpoints(), stream.Endpoints(s.manager), []gateway.Endpoint{mcpHandler.Endpoint()}), Dev: cfg.Dev,
		MaxConnections: cfg.MaxConnections, RequestsPerSecond: cfg.RequestsPerSecond, TrustedProxies: cfg.TrustedProxies,
		Metrics: metrics, Log: log,
	})
	if err != nil {
		return s, err
	}
	return s, s.store.Audit(audit.Event{Action: audit.ServerStart, Actor: audit.ActorServer, Detail: map[string]string{
		"version": version, "address": s.httpListener.Addr().String(), "dev": strconv.FormatBool(cfg.Dev),
	}})
}

// openSandboxes creates the Manager and recovers the sandboxes, or those in initial if the store has none.
func (s *Server) openSandboxes(initial []sandbox.Record) error {
	records, err := s.store.Sandboxes()
	if err == nil && len(records) == 0 {
		for _, rec := range initial {
			err = errors.Join(err, s.store.PutSandbox(rec))
		}
		records = initial
	}
	if err != nil {
		return err
	}
	var runtime sandbox.Runtime = newMicroVMs(records)
	connect := newGuest(s.Runs).Connect
	if s.portals != nil {
		runtime, connect = s.portals, s.portals.connect
	}
	s.manager = sandbox.NewManager(sandbox.Options{
		Store: s.store, Runtime: runtime, Connect: connect,
		Defaults: sandbox.Config{Template: sandbox.Template{Image: s.cfg.DefaultImage, CPUs: s.cfg.DefaultCPUs, MemoryMiB: s.cfg.DefaultMemoryMiB, DiskMiB: s.cfg.DefaultDiskMiB}},
		MaxCPUs:  s.cfg.MaxCPUs, MaxMemoryMiB: s.cfg.MaxMemoryMiB, MaxDiskMiB: s.cfg.MaxDiskMiB, Disks: true,
		Pool:       sandbox.PoolOptions{Min: s.cfg.PoolMin, Max: s.cfg.PoolMax, MemoryMiB: s.cfg.PoolMemoryMiB},
		Total:      sandbox.Quota{Sandboxes: s.cfg.TotalSandboxes, MemoryMiB: s.cfg.TotalMemoryMiB},
		Boots:      4,
		HostMemory: func() (available, total uint64, err error) { return 64 << 30, 64 << 30, nil },
		CheckSpace: s.store.CheckSpace, MakeRoom: s.store.MakeRoom,
		Quota:        func(namespace string) sandbox.Quota { return sandbox.Quota(s.cfg.QuotaOf(namespace)) },
		StartTimeout: time.Minute, MaxRunTime: s.cfg.MaxRunTime, Log: s.log,
	})
	s.recovery, err = s.manager.Recover(s.serving)
	return err
}

// serve serves until the server is stopped, and then closes it.
func (s *Server) serve() error {
	g, ctx := errgroup.WithContext(s.serving)
	g.Go(func() error { return s.serveAdmin(ctx) })
	g.Go(func() error { return s.gateway.Serve(ctx, s.httpListener) })
	g.Go(func() error { return s.issuer.Run(ctx) })
	g.Go(func() error { return s.manager.RunPool(ctx) })
	err := g.Wait()
	if s.serving.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil
	}
	return errors.Join(err, s.close())
}

func (s *Server) close() error {
	s.stop()
	var err error
	if s.manager != nil {
		err = s.manager.StopPool(context.Background())
		s.manager.Close()
	}
	if s.portals != nil {
		err = errors.Join(err, s.portals.close())
	}
	for _, l := range []net.Listener{s.httpListener, s.socket} {
		if l != nil {
			l.Close()
		}
	}
	if s.store != nil {
		err = errors.Join(err, s.store.Close())
	}
	return err
}

// admin returns the server of the admin socket, with the fakes for s.trouble.
func (s *Server) admin() *admin.Server {
	return admin.New(admin.Options{
		Keys:        smallPages{s.issuer},
		Pruner:      s.backups,
		Audit:       s.store,
		Backups:     s.trouble.backups(s.backups),
		Sandboxes:   s.manager,
		Images:      images{},
		MakeRoom:    s.store.MakeRoom,
		State:       s.state,
		Status:      s.status,
		Shutdown:    s.stop,
		Credentials: peer.Credentials(),
		PeerOf:      s.trouble.peerOf,
		Group:       localsock.Group,
		Log:         s.log,
	})
}

// smallPages lists keys in pages of two, so that tests need only a few keys for several pages.
type smallPages struct{ *keys.Issuer }

// List implements admin.Keys.
func (p smallPages) List(f keys.Filter, after string, _ int) ([]keys.Key, string, error) {
	return p.Issuer.List(f, after, 2)
}

func (s *Server) state() (adminv1.GetStatusResponse_DaemonState, []string) {
	switch {
	case s.serving.Err() != nil:
		return adminv1.GetStatusResponse_DAEMON_STATE_DRAINING, nil
	case s.trouble == Degraded:
		return adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED, []string{"the disk is full"}
	}
	return adminv1.GetStatusResponse_DAEMON_STATE_READY, nil
}

// version is the version of the server.
const version = "1.2.3"

// status returns the same status as package daemon, but with a fake host and isolation.
func (s *Server) status() *adminv1.GetStatusResponse {
	state, reasons := s.state()
	count, signing := s.issuer.Counts(), s.issuer.SigningKey()
	st := &adminv1.GetStatusResponse{
		State:               state,
		DegradedReasons:     reasons,
		Version:             version,
		Pid:                 int32(os.Getpid()),
		StartedAt:           timestamppb.New(s.startedAt),
		ListenAddress:       s.httpListener.Addr().String(),
		AuthRequired:        !s.cfg.Dev,
		DevMode:             s.cfg.Dev,
		InstanceId:          signing.InstanceID,
		SigningKeyId:        signing.ID,
		SigningKeyCreatedAt: timestamppb.New(signing.CreatedAt),
		Keys:                &adminv1.KeyCounts{Live: int32(count.Live), Expired: int32(count.Expired), Revoked: int32(count.Revoked)},
		Isolation: &adminv1.Isolation{
			Hypervisor: route.Hypervisor, HypervisorReason: route.HypervisorReason,
			Accelerator: route.Accelerator, Reason: route.AcceleratorReason, Advice: route.Advice,
		},
		Recovery: &adminv1.Recovery{
			Adopted: int32(s.recovery.Adopted), Lost: int32(s.recovery.Lost), Removed: int32(s.recovery.Removed),
		},
		ContainerdVersion: "1.7",
		KataVersion:       "3.0",
		AuditEntries:      s.store.AuditHead().Seq,
	}
	used, room := s.manager.InUse(), s.manager.Room()
	st.Capacity = &adminv1.Capacity{
		Sandboxes: int32(used.Sandboxes), MaxSandboxes: int32(s.cfg.TotalSandboxes),
		MemoryMib: int64(used.MemoryMiB), MaxMemoryMib: int64(s.cfg.TotalMemoryMiB),
		AvailableMemoryMib: new(int64(*room.MemoryBytes >> 20)), FreeDiskMib: new(int64(100 << 10)),
		StartsInProgress: int32(room.Booting), StartsWaiting: int32(room.Waiting),
	}
	st.Pool = admin.PoolSummary(s.manager.PoolStatus())
	if err := s.store.AuditProblem(); err != nil {
		st.Warnings = append(st.Warnings, rpcerr.Message(err))
	}
	for _, rec := range s.manager.List("") {
		switch rec.State {
		case sandbox.Running:
			st.SandboxesRunning++
		case sandbox.Failed:
			st.SandboxesFailed++
		}
	}
	s.trouble.describe(st)
	return st
}
