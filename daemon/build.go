package daemon

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/daemon/internal/backend"
	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/data/backup"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/guest/portalclient"
	"github.com/msbd/msbd/daemon/internal/serve/admin"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/localsock"
	"github.com/msbd/msbd/daemon/internal/serve/mcp"
	"github.com/msbd/msbd/daemon/internal/serve/rpc"
	"github.com/msbd/msbd/daemon/internal/serve/stream"
	"github.com/msbd/msbd/daemon/internal/serve/tlscert"
	"github.com/msbd/msbd/daemon/internal/sys/config"
	"github.com/msbd/msbd/daemon/internal/sys/peer"
)

// startTimeout is the time limit of a sandbox's start. An emulated boot takes seconds, and many starts at once wait for each
// other. The time limits of a boot in the shims' configuration (kata.Settings) are a little shorter.
const startTimeout = 2 * time.Minute

func listenHTTP(cfg config.Config) (net.Listener, error) {
	l, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("%w; choose another port with --port, or stop the program that uses this one", err)
	}
	return l, nil
}

// openCertificates opens the gateway's certificates. It returns nil if the gateway serves plain HTTP.
func openCertificates(cfg config.Config, log *slog.Logger) (*tlscert.Source, error) {
	if !cfg.TLS() {
		return nil, nil
	}
	return tlscert.Open(tlscert.Options{
		CertFile: cfg.TLSCert, KeyFile: cfg.TLSKey, ClientCAFile: cfg.TLSClientCA,
		ACME: tlscert.ACME{
			Domains: cfg.Domains(), Email: cfg.ACMEEmail, DirectoryURL: cfg.ACMEDirectory, DirectoryCAFile: cfg.ACMEDirectoryCA,
			CacheDir: filepath.Join(cfg.StateDir, "acme"),
		},
		Log: log,
	})
}

// withTLS returns a TLS listener on l, or l itself if certs is nil.
func withTLS(l net.Listener, certs *tlscert.Source) net.Listener {
	if certs == nil {
		return l
	}
	return tls.NewListener(l, certs.Config())
}

// keyServices are the services for API keys.
type keyServices struct {
	issuer   *keys.Issuer
	verifier *keys.Verifier
	backups  *backup.Service
}

// openKeys completes an interrupted restore, and then opens the API keys, with a new signing key if the configuration
// requests one.
func openKeys(ctx context.Context, cfg config.Config, db *store.Store, log *slog.Logger) (keyServices, error) {
	o := keys.Options{KeyringPath: filepath.Join(cfg.StateDir, "keyring.json"), Store: db, Log: log}
	err := backup.Complete(ctx, cfg.StateDir, func() (backup.Keys, error) {
		issuer, _, err := keys.Open(o)
		return issuer, err
	}, log)
	if err != nil {
		return keyServices{}, err
	}
	o.Reset = cfg.ResetKey
	issuer, verifier, err := keys.Open(o)
	if err != nil {
		return keyServices{}, err
	}
	backups := backup.New(backup.Options{Dir: cfg.StateDir, Keys: issuer, Store: db, ReadKeys: store.ReadKeys, Log: log})
	return keyServices{issuer, verifier, backups}, nil
}

// newManager returns the Manager of the sandboxes. It refuses work until recoverSandboxes has run.
func newManager(cfg config.Config, db *store.Store, machines *backend.Backend, log *slog.Logger) *sandbox.Manager {
	return sandbox.NewManager(sandbox.Options{
		Store:   db,
		Runtime: machines.Runtime,
		Connect: func(ctx context.Context, stream io.ReadWriteCloser, attach sandbox.Attach) (sandbox.Portal, error) {
			return portalclient.New(ctx, stream, attach)
		},
		Defaults:     sandbox.Config{Template: sandbox.Template{Image: cfg.DefaultImage, CPUs: cfg.DefaultCPUs, MemoryMiB: cfg.DefaultMemoryMiB, DiskMiB: cfg.DefaultDiskMiB}},
		MaxCPUs:      cfg.MaxCPUs,
		MaxMemoryMiB: cfg.MaxMemoryMiB,
		MaxDiskMiB:   cfg.MaxDiskMiB,
		Disks:        machines.Disks,
		Pool:         poolOptions(cfg, machines),
		Total:        sandbox.Quota{Sandboxes: cfg.TotalSandboxes, MemoryMiB: cfg.TotalMemoryMiB},
		Boots:        max(2, runtime.NumCPU()),
		HostMemory:   machines.Route.Memory,
		CheckSpace:   db.CheckSpace,
		MakeRoom:     db.MakeRoom,
		Quota:        func(namespace string) sandbox.Quota { return sandbox.Quota(cfg.QuotaOf(namespace)) },
		StartTimeout: startTimeout,
		MaxRunTime:   cfg.MaxRunTime,
		CodeGrace:    codeGrace(machines.Route.Accelerator),
		Log:          log,
	})
}

// poolOptions says which microVMs are started in advance.
func poolOptions(cfg config.Config, machines *backend.Backend) sandbox.PoolOptions {
	o := sandbox.PoolOptions{Min: cfg.PoolMin, Max: cfg.PoolMax, MemoryMiB: cfg.PoolMemoryMiB}
	if !machines.Disks {
		o.Unsupported = "sandboxes run with Kata's own driver, which cannot start microVMs in advance"
	}
	return o
}

// poolStopTimeout bounds how long the end of the server waits for the end of the pool's entries.
const poolStopTimeout = 8 * time.Second

// runPool keeps the pool filled until ctx ends, and then removes its entries, which nobody uses.
func runPool(ctx context.Context, manager *sandbox.Manager, log *slog.Logger) error {
	err := manager.RunPool(ctx)
	<-ctx.Done()
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), poolStopTimeout)
	defer cancel()
	if err := manager.StopPool(limited); err != nil {
		log.Warn("could not stop the pool; the next server does", "err", err)
	}
	return err
}

// codeGrace returns how long code has to react to an interrupt. An emulated interpreter on a busy host has taken more than 5 s.
func codeGrace(accelerator string) time.Duration {
	if accelerator == host.TCG {
		return 15 * time.Second
	}
	return 2 * time.Second
}

// recoverSandboxes reconciles the records of an earlier daemon with the microVMs that still exist.
func recoverSandboxes(ctx context.Context, manager *sandbox.Manager, machines *backend.Backend, st *status) error {
	containerd, kata, err := machines.Versions(ctx)
	if err != nil {
		return err
	}
	recovery, err := manager.Recover(ctx)
	if err != nil {
		return err
	}
	st.setRecovery(recovery, containerd, kata)
	return nil
}

// newGateway returns the HTTP gateway with its endpoints.
func newGateway(cfg config.Config, verifier *keys.Verifier, manager *sandbox.Manager, st *status, log *slog.Logger) (*gateway.Gateway, error) {
	metrics := newMetrics(st)
	methods, err := rpc.New(manager, cfg.Version, metrics)
	if err != nil {
		return nil, err
	}
	mcpHandler, err := mcp.New(methods, cfg.Version)
	if err != nil {
		return nil, err
	}
	endpoints := append(methods.Endpoints(), mcpHandler.Endpoint())
	return gateway.New(gateway.Options{
		Verifier: verifier, Endpoints: append(endpoints, stream.Endpoints(manager)...), Dev: cfg.Dev,
		MaxConnections: cfg.MaxConnections, RequestsPerSecond: cfg.RequestsPerSecond, TrustedProxies: cfg.TrustedProxies,
		Metrics: metrics, Log: log,
	})
}

// newAdmin returns the server of the admin socket. shutdown makes the daemon exit.
func newAdmin(services keyServices, db *store.Store, manager *sandbox.Manager, machines *backend.Backend, st *status, shutdown func(), log *slog.Logger) *admin.Server {
	return admin.New(admin.Options{
		Keys:        services.issuer,
		Pruner:      services.backups,
		Audit:       db,
		Backups:     services.backups,
		Sandboxes:   manager,
		Images:      machines.Images,
		MakeRoom:    db.MakeRoom,
		State:       st.current,
		Status:      st.report,
		Shutdown:    shutdown,
		Credentials: peer.Credentials(),
		PeerOf:      peer.FromContext,
		Group:       localsock.Group,
		Log:         log,
	})
}

// recordStart logs warnings about insecure settings, and records the start in the audit log, with the settings that are
// relevant to security.
func recordStart(cfg config.Config, address string, db *store.Store, log *slog.Logger) {
	for _, warning := range settingWarnings(cfg, address) {
		log.Warn(warning)
	}
	// Start even if the audit log cannot be written, for example because the disk is full, so that users can still use
	// their sandboxes. The status then says that the server is degraded, and it refuses changes.
	if err := db.Audit(audit.Event{Action: audit.ServerStart, Actor: audit.ActorServer, Detail: map[string]string{
		"version": cfg.Version, "address": address, "dev": strconv.FormatBool(cfg.Dev), "tls": strconv.FormatBool(cfg.TLS()),
		"insecure_behind_proxy": strconv.FormatBool(cfg.InsecureBehindProxy), "hypervisor": cfg.Hypervisor, "accelerator": cfg.Accelerator,
	}}); err != nil {
		log.Error("could not record the start in the audit log", "err", err)
	}
}
