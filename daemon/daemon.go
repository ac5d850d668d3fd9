// Package daemon makes msbd: it builds the parts, runs them side by side, and takes them down. It is the only
// package that imports more than one group of daemon/internal.
package daemon

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"github.com/msbd/msbd/daemon/internal/backend"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/localsock"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// Run serves until ctx ends or an administrator asks it to stop, and returns nil then. Sandboxes keep running unless the
// administrator asked otherwise.
func Run(ctx context.Context, cfg config.Config, log *slog.Logger) (err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()

	// The listeners come first: a second daemon, or a port in use, is found before anything is changed.
	db, err := store.Open(cfg.StateDir)
	if err != nil {
		return err
	}
	defer closeInto(&err, db.Close)
	httpListener, err := listenHTTP(cfg)
	if err != nil {
		return err
	}
	defer httpListener.Close()
	socket, err := localsock.Listen(cfg.SocketPath())
	if err != nil {
		return err
	}
	defer socket.Close()

	certs, err := openCertificates(cfg, log)
	if err != nil {
		return err
	}
	keyring, err := openKeys(ctx, cfg, db, log)
	if err != nil {
		return err
	}
	machines, err := backend.New(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer closeInto(&err, machines.Close)
	manager := newManager(cfg, db, machines, log)
	defer manager.Close()

	st := &status{
		cfg: cfg, address: httpListener.Addr().String(), began: time.Now(), state: starting,
		store: db, issuer: keyring.issuer, manager: manager, route: machines.Route, certs: certs, log: log,
	}
	gateway, err := newGateway(cfg, keyring.verifier, manager, st, log)
	if err != nil {
		return err
	}
	admin := newAdmin(keyring, db, manager, machines, st, stop, log)
	announce(cfg, st.address, db, log)

	// From here on everything runs side by side; the first to fail, or a stop, ends all.
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return admin.Serve(ctx, socket) })
	g.Go(func() error { return gateway.Serve(ctx, withTLS(httpListener, certs)) })
	g.Go(func() error { return keyring.issuer.Run(ctx) })
	if certs != nil {
		g.Go(func() error { return certs.Run(ctx) })
	}
	g.Go(func() error {
		return machines.Run(ctx, func(ctx context.Context) error {
			st.enter(recovering)
			if err := recoverSandboxes(ctx, manager, machines, st); err != nil {
				return err
			}
			st.enter(ready)
			log.Info("ready", "address", st.address, "dev", cfg.Dev, "hypervisor", machines.Route.Hypervisor, "accelerator", machines.Route.Accelerator)
			_, err := systemd.SdNotify(false, systemd.SdNotifyReady)
			return err
		})
	})
	g.Go(func() error {
		<-ctx.Done()
		st.enter(draining)
		systemd.SdNotify(false, systemd.SdNotifyStopping)
		return nil
	})
	err = g.Wait()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil
	}
	if !holdsMicroVMs(db) {
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		err = errors.Join(err, machines.Stop(ending))
	}
	return err
}

// holdsMicroVMs reports whether any sandbox has one, or may have. It asks the store: a manager that has not recovered knows
// of no sandbox.
func holdsMicroVMs(db *store.Store) bool {
	records, err := db.Sandboxes()
	return err != nil || slices.ContainsFunc(records, func(r sandbox.Record) bool { return r.State != sandbox.Failed })
}

func closeInto(err *error, close func() error) { *err = errors.Join(*err, close()) }
