// Package daemon is msbd: it creates the components, runs them concurrently and shuts them down. Only this package connects
// all groups of packages in daemon/internal.
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
	"github.com/msbd/msbd/daemon/internal/backend/kata"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/localsock"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// Run runs the daemon until ctx is canceled or an administrator shuts it down, and then returns nil. Sandboxes keep
// running, unless the administrator has asked to stop them.
func Run(ctx context.Context, cfg config.Config, log *slog.Logger) (err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()

	// Open the store and the listeners first, so that a second daemon or a port in use is detected before anything is
	// changed.
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
	services, err := openKeys(ctx, cfg, db, log)
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
		cfg: cfg, address: httpListener.Addr().String(), startedAt: time.Now(), state: starting,
		store: db, issuer: services.issuer, manager: manager, route: machines.Route, certs: certs, log: log,
	}
	gateway, err := newGateway(cfg, services.verifier, manager, st, log)
	if err != nil {
		return err
	}
	admin := newAdmin(services, db, manager, machines, st, stop, log)
	recordStart(cfg, st.address, db, log)

	// Run everything concurrently. The first error, or a shutdown, stops all.
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return admin.Serve(ctx, socket) })
	g.Go(func() error { return gateway.Serve(ctx, withTLS(httpListener, certs)) })
	g.Go(func() error { return services.issuer.Run(ctx) })
	g.Go(func() error { return db.Run(ctx, int64(cfg.AuditSegmentMiB)<<20, log) })
	machinesCtx, stopMachines := context.WithCancel(context.WithoutCancel(ctx))
	defer stopMachines()
	g.Go(func() error {
		defer stopMachines()
		return runPool(ctx, manager, log) // needs the machines until it returns
	})
	if certs != nil {
		g.Go(func() error { return certs.Run(ctx) })
	}
	g.Go(func() error {
		return machines.Run(machinesCtx, kata.TemplateBuilder{Admit: manager.AdmitTemplate, Rehearse: manager.RehearseTemplate}, func(ctx context.Context) error {
			st.setState(recovering)
			if err := recoverSandboxes(ctx, manager, machines, st); err != nil {
				return err
			}
			st.setState(ready)
			log.Info("ready", "address", st.address, "dev", cfg.Dev, "hypervisor", machines.Route.Hypervisor, "accelerator", machines.Route.Accelerator)
			_, err := systemd.SdNotify(false, systemd.SdNotifyReady)
			return err
		})
	})
	g.Go(func() error {
		<-ctx.Done()
		st.setState(draining)
		systemd.SdNotify(false, systemd.SdNotifyStopping)
		return nil
	})
	err = g.Wait()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil
	}
	if !hasMicroVMs(db) {
		stopCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		err = errors.Join(err, machines.Stop(stopCtx))
	}
	return err
}

// hasMicroVMs reports whether any sandbox has a microVM or may have one. It reads the store, because the Manager knows of no
// sandbox before it has recovered.
func hasMicroVMs(db *store.Store) bool {
	records, err := db.Sandboxes()
	return err != nil || slices.ContainsFunc(records, func(r sandbox.Record) bool { return r.State != sandbox.Failed })
}

// closeInto calls close and joins its error to *err.
func closeInto(err *error, close func() error) { *err = errors.Join(*err, close()) }
