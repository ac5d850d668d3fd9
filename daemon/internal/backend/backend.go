// Package backend runs sandboxes as microVMs on this host. It connects the packages below it: containerd, msbd's
// hypervisor service, Kata's runtime and the image store. Only package daemon may import it. Of the packages below it,
// daemon imports only host, which describes the machine.
package backend

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/containerd/containerd"
	"golang.org/x/sync/errgroup"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/backend/image"
	"github.com/msbd/msbd/daemon/internal/backend/kata"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// A Backend runs the sandboxes of one server.
type Backend struct {
	// Route is the hypervisor and accelerator that sandboxes run on, with the reasons for the choice.
	Route host.Route
	// Runtime starts, finds and removes microVMs. It is usable once Run has called ready.
	Runtime sandbox.Runtime
	// Images holds the images that sandboxes start from. It is usable once Run has called ready.
	Images *image.Store

	kata    *kata.Runtime
	vms     *hypervisor.Service
	private *ctrd.Private // nil if the server uses the host's containerd
	client  *containerd.Client
	log     *slog.Logger
}

// New chooses the hypervisor and accelerator, and checks that this host has the programs and devices that they need. It
// returns errdefs.ErrFailedPrecondition if something is missing, and errdefs.ErrInvalidArgument if a setting is wrong.
// It starts neither microVMs nor containerd. Call Close when the Backend is no longer needed.
func New(ctx context.Context, cfg config.Config, log *slog.Logger) (*Backend, error) {
	route, err := host.Choose(HostOptions(cfg))
	if err != nil {
		return nil, err
	}
	settings, err := shimSettings(ctx, cfg, route)
	if err != nil {
		return nil, err
	}
	vms, err := hypervisor.New(serviceConfig(cfg, route, settings, log))
	if err != nil {
		return nil, err
	}
	b := &Backend{Route: route, vms: vms, log: log}
	paths := ctrd.SystemPaths(cfg.Containerd)
	if cfg.Containerd == "" {
		paths = ctrd.Paths{
			Root:    filepath.Join(cfg.StateDir, "containerd"),
			State:   filepath.Join(cfg.RunDir, "containerd"),
			Address: filepath.Join(cfg.RunDir, "containerd.sock"),
		}
		b.private = &ctrd.Private{Binary: filepath.Join(cfg.LibDir, "containerd"), Paths: paths, Log: log}
	}
	if b.client, err = ctrd.Dial(paths.Address); err != nil {
		return nil, err
	}
	b.Images = image.NewStore(b.client, image.Unpack)
	b.kata, err = kata.New(kata.Config{
		Client:     b.client,
		Containerd: paths,
		Shim:       cmp.Or(cfg.KataShim, filepath.Join(cfg.LibDir, "containerd-shim-kata-v2")),
		Settings:   settings,
		RunDir:     cfg.RunDir,
		VMs:        vms,
		Image:      b.Images.Resolve,
		Log:        log,
	})
	if err != nil {
		b.client.Close()
		return nil, err
	}
	b.Runtime = b.kata
	return b, nil
}

// HostOptions returns the settings in cfg that the choice of a route depends on.
func HostOptions(cfg config.Config) host.Options {
	return host.Options{
		Hypervisor: cfg.Hypervisor, Accelerator: cfg.Accelerator, KataConfig: cfg.KataConfig, KataShim: cfg.KataShim,
		QEMU: cfg.QEMU, Virtiofsd: cfg.Virtiofsd, LibDir: cfg.LibDir, CacheDir: cfg.RunDir,
	}
}

func serviceSocket(cfg config.Config) string { return filepath.Join(cfg.RunDir, "hypervisor.sock") }

// shimSettings returns the settings with which Kata's shims run microVMs on route.
func shimSettings(ctx context.Context, cfg config.Config, route host.Route) (kata.Settings, error) {
	settings := kata.Settings{
		Kernel: filepath.Join(cfg.LibDir, "guest", "vmlinux"),
		Initrd: filepath.Join(cfg.LibDir, "guest", "initrd.img"),
	}
	qemu, err := host.FindQEMU(cfg.QEMU)
	var virtiofsd string
	if err == nil {
		virtiofsd, err = host.FindVirtiofsd(cfg.Virtiofsd)
	}
	if err == nil {
		settings.Virtiofsd, err = host.VirtiofsdCommand(ctx, virtiofsd, filepath.Join(cfg.LibDir, "msb-virtiofsd"))
	}
	if err == nil {
		settings.QEMU = qemu
		settings.Programs = []string{qemu, virtiofsd}
	}
	if cfg.KataConfig != "" { // ignore err, because a custom configuration may name other programs
		settings.Config, settings.Portal = cfg.KataConfig, filepath.Join(cfg.LibDir, "msb-portal")
		return settings, nil
	}
	if route.Hypervisor == host.Builtin {
		settings.HypervisorSocket = serviceSocket(cfg)
	}
	return settings, err
}

// serviceConfig returns the configuration of the hypervisor service. If no shim can call the service, the configuration
// has no programs: the service then only manages the VMs that it started before the server's configuration changed.
func serviceConfig(cfg config.Config, route host.Route, settings kata.Settings, log *slog.Logger) hypervisor.Config {
	service := hypervisor.Config{
		Socket: serviceSocket(cfg), Dir: filepath.Join(cfg.RunDir, "vm"), Programs: settings.Programs, Log: log,
	}
	// With settings.Config, the host's Kata configuration may name the service.
	if settings.HypervisorSocket != "" || settings.Config != "" {
		service.QEMU, service.Virtiofsd, service.Accelerator = settings.QEMU, settings.Virtiofsd, route.Accelerator
		service.Kernel, service.Initrd = settings.Kernel, settings.Initrd
	}
	return service
}

// Run adopts the microVMs and the containerd of an earlier server, starts containerd if none is running, and supervises
// them until ctx ends. It calls ready once, when Runtime and Images are usable. It returns early if ready or a
// component returns an error. Sandboxes and containerd keep running after Run returns.
func (b *Backend) Run(ctx context.Context, ready func(context.Context) error) error {
	found, err := b.vms.Recover(ctx)
	if err != nil {
		// Not fatal: removing the sandbox tries again, and a VM that cannot be removed does not affect the others.
		b.log.Error("could not recover all microVMs", "err", err)
	}
	b.log.Info("recovered microVMs", "adopted", len(found.Adopted), "removed", len(found.Removed))
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return b.vms.Serve(ctx) }) // also watches the adopted VMs
	g.Go(func() error {
		if b.private != nil {
			if err := b.private.Start(ctx); err != nil {
				return err
			}
		}
		return ready(ctx)
	})
	return g.Wait()
}

// Versions returns the versions that containerd and Kata's shim report.
func (b *Backend) Versions(ctx context.Context) (containerd, kata string, err error) {
	version, err := b.client.Version(ctx)
	if err != nil {
		return "", "", fmt.Errorf("ask containerd for its version: %w", err)
	}
	kata, err = b.kata.Version(ctx)
	return version.Version, kata, err
}

// Stop stops the server's private containerd, if it has one. All sandboxes must have been stopped.
func (b *Backend) Stop(ctx context.Context) error {
	if b.private == nil {
		return nil
	}
	return b.private.Stop(ctx)
}

// Close releases the Backend's resources in this process. Sandboxes and containerd keep running.
func (b *Backend) Close() error {
	b.kata.Close()
	return b.client.Close()
}
