// Package daemon wires msbd: it makes the rooms, joins them, and takes them down in reverse. It is
// the only place where adapters meet.
package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"github.com/msbd/msbd/api/audit"
	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/backend"
	"github.com/msbd/msbd/daemon/internal/backend/image"
	"github.com/msbd/msbd/daemon/internal/data/backup"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/guest/portalclient"
	"github.com/msbd/msbd/daemon/internal/serve/admin"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/localsock"
	"github.com/msbd/msbd/daemon/internal/serve/mcp"
	"github.com/msbd/msbd/daemon/internal/serve/tlscert"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// startTimeout bounds a sandbox's start. Emulated boots take seconds, and many at once take turns.
const startTimeout = 2 * time.Minute

// Run serves until ctx ends or an administrator asks it to stop, and returns nil then. Sandboxes
// run on unless the administrator asked otherwise.
func Run(ctx context.Context, cfg config.Config, log *slog.Logger) (err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()

	// The doors come first: a second daemon, or a port in use, is found out before anything is touched.
	state, err := store.Open(cfg.StateDir)
	if err != nil {
		return err
	}
	defer closeInto(&err, state.Close)
	http, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return fmt.Errorf("%w: choose another with --port, or end what uses it", err)
	}
	defer http.Close()
	socket, err := localsock.Listen(cfg.SocketPath())
	if err != nil {
		return err
	}
	defer socket.Close()

	var certs *tlscert.Source
	if cfg.TLS() {
		certs, err = tlscert.Open(tlscert.Options{
			CertFile: cfg.TLSCert, KeyFile: cfg.TLSKey, ClientCAFile: cfg.TLSClientCA,
			ACME: tlscert.ACME{
				Domains: cfg.Domains(), Email: cfg.ACMEEmail, DirectoryURL: cfg.ACMEDirectory, DirectoryCAFile: cfg.ACMEDirectoryCA,
				CacheDir: filepath.Join(cfg.StateDir, "acme"),
			},
			Log: log,
		})
		if err != nil {
			return err
		}
	}

	keyOptions := keys.Options{KeyringPath: filepath.Join(cfg.StateDir, "keyring.json"), Store: state, Log: log}
	err = backup.Complete(ctx, cfg.StateDir, func() (backup.Keys, error) {
		issuer, _, err := keys.Open(keyOptions)
		return issuer, err
	}, log)
	if err != nil {
		return err
	}
	keyOptions.Reset = cfg.ResetKey
	issuer, verifier, err := keys.Open(keyOptions)
	if err != nil {
		return err
	}
	backups := backup.New(backup.Options{Dir: cfg.StateDir, Keys: issuer, Store: state, ReadKeys: store.ReadKeys, Log: log})

	machines, err := backend.New(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer machines.Close()

	manager := sandbox.NewManager(sandbox.Options{
		Store:   state,
		Runtime: machines.Runtime,
		Connect: func(ctx context.Context, stream io.ReadWriteCloser) (sandbox.Portal, error) {
			return portalclient.New(ctx, stream)
		},
		Defaults:     sandbox.Config{Image: cfg.DefaultImage, CPUs: cfg.DefaultCPUs, MemoryMiB: cfg.DefaultMemoryMiB},
		MaxCPUs:      cfg.MaxCPUs,
		MaxMemoryMiB: cfg.MaxMemoryMiB,
		Quota:        func(namespace string) sandbox.Quota { return sandbox.Quota(cfg.QuotaOf(namespace)) },
		StartTimeout: startTimeout,
		MaxRunTime:   cfg.MaxRunTime,
		Log:          log,
	})
	defer manager.Close()

	life := &life{
		cfg: cfg, address: http.Addr().String(), began: time.Now(), state: starting,
		store: state, issuer: issuer, manager: manager, route: machines.Route, certs: certs, log: log,
	}
	office := admin.New(admin.Options{
		Keys:        adminKeys{issuer, backups},
		Audit:       state,
		Backups:     adminBackups{backups},
		Sandboxes:   manager,
		Images:      adminImages{machines.Images},
		State:       life.now,
		Status:      life.status,
		Shutdown:    stop,
		Credentials: localsock.Credentials(),
		PeerOf: func(ctx context.Context) (admin.Peer, bool) {
			peer, ok := localsock.PeerFromContext(ctx)
			return admin.Peer{UID: peer.UID, Groups: peer.Groups}, ok
		},
		Group: localsock.Group,
		Log:   log,
	})
	door, err := gateway.New(gateway.Options{
		Verifier: verifier, Sandboxes: manager, Dev: cfg.Dev,
		MaxConnections: cfg.MaxConnections, RequestsPerSecond: cfg.RequestsPerSecond, TrustedProxies: cfg.TrustedProxies,
		Metrics: newMetrics(life), Log: log,
	})
	if err != nil {
		return err
	}
	assistants, err := mcp.New(door, cfg.Version)
	if err != nil {
		return err
	}
	door.Mount(rpc.MCPPath, assistants)

	for _, warning := range openings(cfg, http.Addr().String()) {
		log.Warn(warning)
	}
	// A disk that is full must not keep sandboxes from their users: the status says so, and nothing changes.
	if err := state.Audit(startEvent(cfg, http.Addr().String())); err != nil {
		log.Error("the start is not in the audit log", "err", err)
	}

	// From here on everything runs side by side; the first to fail, or a stop, ends all.
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return office.Serve(ctx, socket) })
	g.Go(func() error { return door.Serve(ctx, withTLS(http, certs)) })
	g.Go(func() error { return issuer.Run(ctx) })
	if certs != nil {
		g.Go(func() error { return certs.Run(ctx) })
	}
	g.Go(func() error {
		return machines.Run(ctx, func(ctx context.Context) error {
			life.enter(recovering)
			if err := recoverAll(ctx, life, manager, machines); err != nil {
				return err
			}
			life.enter(ready)
			log.Info("ready", "address", http.Addr().String(), "dev", cfg.Dev,
				"hypervisor", machines.Route.Hypervisor, "accelerator", machines.Route.Accelerator)
			_, err := systemd.SdNotify(false, systemd.SdNotifyReady)
			return err
		})
	})
	g.Go(func() error {
		<-ctx.Done()
		life.enter(draining)
		systemd.SdNotify(false, systemd.SdNotifyStopping)
		return nil
	})
	err = g.Wait()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil
	}
	if microVMs(manager) == 0 {
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		err = errors.Join(err, machines.Stop(ending))
	}
	return err
}

// recoverAll brings what an earlier daemon left, or what died meanwhile, in order.
func recoverAll(ctx context.Context, life *life, manager *sandbox.Manager, machines *backend.Backend) error {
	containerd, kata, err := machines.Versions(ctx)
	if err != nil {
		return err
	}
	recovery, err := manager.Recover(ctx)
	if err != nil {
		return err
	}
	life.recovered(recovery, containerd, kata)
	return nil
}

// microVMs counts the sandboxes that hold one.
func microVMs(manager *sandbox.Manager) (n int) {
	for _, rec := range manager.List("") {
		if rec.State != sandbox.Failed {
			n++
		}
	}
	return n
}

// withTLS is the gateway's listener. Without certificates it is plain.
func withTLS(l net.Listener, certs *tlscert.Source) net.Listener {
	if certs == nil {
		return l
	}
	return tls.NewListener(l, certs.Config())
}

// startEvent is the start of this server in the audit log, with the settings that security depends on.
func startEvent(cfg config.Config, address string) audit.Event {
	return audit.Event{Action: audit.ServerStart, Actor: audit.ActorServer, Detail: map[string]string{
		"version": cfg.Version, "address": address, "dev": strconv.FormatBool(cfg.Dev), "tls": strconv.FormatBool(cfg.TLS()),
		"insecure_behind_proxy": strconv.FormatBool(cfg.InsecureBehindProxy), "hypervisor": cfg.Hypervisor, "accelerator": cfg.Accelerator,
	}}
}

// adminKeys are the keys, of which none is forgotten that a restore could bring back.
type adminKeys struct {
	*keys.Issuer
	backups *backup.Service
}

func (k adminKeys) Prune(ctx context.Context, deadFor string, dryRun bool, by uint32) ([]keys.Key, error) {
	return k.backups.Prune(ctx, deadFor, dryRun, by)
}

// adminBackups and adminImages say what one room knows in the words of another.
type adminBackups struct{ *backup.Service }

func (s adminBackups) Restore(ctx context.Context, r io.Reader, by uint32) (admin.Restored, error) {
	summary, err := s.Service.Restore(ctx, r, by)
	return admin.Restored(summary), err
}

type adminImages struct{ *image.Store }

func (s adminImages) Import(ctx context.Context, path string) ([]admin.Image, error) {
	return toAdmin(s.Store.Import(ctx, path))
}

func (s adminImages) List(ctx context.Context) ([]admin.Image, error) {
	return toAdmin(s.Store.List(ctx))
}

func toAdmin(images []image.Image, err error) ([]admin.Image, error) {
	var out []admin.Image
	for _, img := range images {
		out = append(out, admin.Image(img))
	}
	return out, err
}

func closeInto(err *error, close func() error) { *err = errors.Join(*err, close()) }
