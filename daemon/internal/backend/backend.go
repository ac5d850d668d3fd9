// Package backend runs sandboxes as microVMs on this host. It connects the packages below it: containerd, msbd's
// hypervisor service, Kata's runtime and the image store. Only package daemon may import it. Of the packages below it,
// daemon imports only host, which describes the machine.
package backend

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/containerd/containerd"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/backend/disk"
	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/backend/image"
	"github.com/msbd/msbd/daemon/internal/backend/kata"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/config"
	"github.com/msbd/msbd/daemon/internal/sys/kataconf"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// A Backend runs the sandboxes of one server.
type Backend struct {
	// Route is the hypervisor and accelerator that sandboxes run on, with the reasons for the choice.
	Route host.Route
	// Runtime starts, finds and removes microVMs. It is usable once Run has called ready.
	Runtime sandbox.Runtime
	// Disks reports whether sandboxes have disks of their own, whose size can be chosen. Kata's own driver has none.
	Disks bool
	// Images holds the images that sandboxes start from. It is usable once Run has called ready.
	Images *image.Store

	kata    *kata.Runtime
	vms     *hypervisor.Service
	disks   *disk.Store
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
	disks, err := disk.New(filepath.Join(cfg.StateDir, "disks"), log)
	if err != nil {
		return nil, err
	}
	service := serviceConfig(cfg, route, settings, log)
	vms, err := hypervisor.New(service)
	if err != nil {
		return nil, err
	}
	b := &Backend{Route: route, Disks: settings.UsesDisks(), disks: disks, vms: vms, log: log}
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
	if b.Disks {
		b.Images = image.NewStore(b.client, b.buildDisk)
	}
	b.Images.OnChange = func(ctx context.Context, images []containerd.Image) {
		b.pruneDisks(ctx, images) // there are also disks if the server used disks before
		for _, img := range images {
			b.kata.KeepTemplate(img, sandbox.Template{CPUs: cfg.DefaultCPUs, MemoryMiB: cfg.DefaultMemoryMiB, DiskMiB: cfg.DefaultDiskMiB})
		}
	}
	b.kata, err = kata.New(kata.Config{
		Client:     b.client,
		Containerd: paths,
		Shim:       cmp.Or(cfg.KataShim, filepath.Join(cfg.LibDir, "containerd-shim-kata-v2")),
		Settings:   settings,
		RunDir:     cfg.RunDir,
		VMs:        vms,
		Disks:      disks,

		MaxTemplates: service.MaxTemplates,
		Image:        b.Images.Resolve,
		Log:          log,
	})
	if err != nil {
		b.client.Close()
		return nil, err
	}
	b.Runtime = b.kata
	return b, nil
}

// RunJailIfChild must be called first in main of every program that runs a Backend. In a child process that msbd starts
// to run QEMU, it does not return.
func RunJailIfChild() { hypervisor.RunJailIfChild() }

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
	if err == nil {
		settings.QEMU = qemu
		settings.Programs = []string{qemu}
	}
	virtiofsd, virtiofsdErr := host.FindVirtiofsd(cfg.Virtiofsd)
	if virtiofsdErr == nil {
		settings.Programs = append(settings.Programs, virtiofsd)
		settings.Virtiofsd, virtiofsdErr = host.VirtiofsdCommand(ctx, virtiofsd, filepath.Join(cfg.LibDir, "msb-virtiofsd"))
	}
	switch {
	case cfg.KataConfig != "": // ignore the errors, because a custom configuration may name other programs
		settings.Config, settings.Portal = cfg.KataConfig, filepath.Join(cfg.LibDir, "msb-portal")
		if custom, err := kataconf.Read(cfg.KataConfig); err != nil || custom.RemoteSocket != serviceSocket(cfg) {
			return settings, nil
		}
	case route.Hypervisor == host.Kata:
		return settings, cmp.Or(err, virtiofsdErr)
	}
	settings.HypervisorSocket = serviceSocket(cfg)
	_, erofsErr := disk.MkfsErofs.Find()
	_, ext4Err := disk.MkfsExt4.Find()
	return settings, errors.Join(err, erofsErr, ext4Err)
}

// serviceConfig returns the configuration of the hypervisor service. If the shims do not call the service, the
// configuration has no QEMU: the service then only manages the VMs that it started before the server's configuration
// changed.
func serviceConfig(cfg config.Config, route host.Route, settings kata.Settings, log *slog.Logger) hypervisor.Config {
	first, count, _ := cfg.QEMUUIDs() // package config has checked it
	service := hypervisor.Config{
		Socket: serviceSocket(cfg), Dir: filepath.Join(cfg.RunDir, "vm"), Programs: settings.Programs, Log: log,
		UIDs: process.UIDs{First: first, Count: count},
	}
	if settings.UsesDisks() {
		service.QEMU, service.Accelerator = settings.QEMU, route.Accelerator
		service.Kernel, service.Initrd = settings.Kernel, settings.Initrd
		service.DiskMiBPerSecond, service.DiskOpsPerSecond = cfg.DiskMiBPerSecond, cfg.DiskOpsPerSecond
		// The container of a template is the one that msbd's own shim, with its own configuration, asks the guest for.
		if cfg.KataShim == "" && cfg.KataConfig == "" {
			service.TemplateDir, service.MaxTemplates = filepath.Join(cfg.StateDir, "templates"), cfg.MaxTemplates
		}
	}
	return service
}

// Run adopts the microVMs and the containerd of an earlier server, starts containerd if none is running, and supervises
// them until ctx ends. It calls ready once, when Runtime and Images are usable. After that, it builds templates. It returns early
// if ready or a component returns an error. Sandboxes and containerd keep running after Run returns.
func (b *Backend) Run(ctx context.Context, templates kata.TemplateBuilder, ready func(context.Context) error) error {
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
		g.Go(func() error {
			b.buildDisks(ctx)
			return nil
		})
		if err := ready(ctx); err != nil {
			return err
		}
		b.kata.BuildTemplates(ctx, templates)
		return nil
	})
	return g.Wait()
}

// buildDisk makes the disk of img.
func (b *Backend) buildDisk(ctx context.Context, img containerd.Image, progress func(done, total int64)) error {
	_, err := b.disks.BuildImage(ctx, img, progress)
	return err
}

// pruneDisks removes the disks and the templates of all images except images.
func (b *Backend) pruneDisks(ctx context.Context, images []containerd.Image) {
	keep := make([]digest.Digest, 0, len(images))
	for _, img := range images {
		chain, err := disk.ChainID(ctx, img)
		if errdefs.IsNotFound(err) {
			continue // its content is gone, so no sandbox can be started from it
		}
		if err != nil {
			b.log.Warn("could not remove the disks of images that were removed; if this is repeated, remove or import the image again",
				"image", img.Name(), "err", err)
			return
		}
		keep = append(keep, chain)
	}
	names := make([]string, len(keep))
	for i, chain := range keep {
		names[i] = chain.Encoded()
	}
	b.vms.PruneTemplates(names)
	if err := b.disks.PruneImages(keep); err != nil {
		b.log.Warn("could not remove the disks of images that were removed", "err", err)
	}
}

// buildDisks makes the disks of all images that have none, such as those that an earlier version imported or those that
// are damaged, and removes the disks that an interrupted import or removal left. Sandboxes can be started meanwhile.
func (b *Backend) buildDisks(ctx context.Context) {
	err := b.Images.Changed(ctx)
	if b.Disks {
		err = errors.Join(err, b.Images.PrepareAll(ctx), b.disks.VerifyImages(ctx), b.Images.PrepareAll(ctx))
	}
	if err != nil && ctx.Err() == nil { // not fatal: the start of a sandbox tries again
		b.log.Error("could not make the disks of all images", "err", err)
	}
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
