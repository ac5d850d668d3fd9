package daemon

import (
	"context"

	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/serve/localsock"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// Examine says what this host is good for as it is configured, after the checks that were made already.
func Examine(ctx context.Context, cfg config.Config, made ...host.Check) host.Report {
	return host.Examine(ctx, hostOptions(cfg), host.Server{
		StateDir: cfg.StateDir, Socket: cfg.SocketPath(), Group: localsock.Group,
		Listen: cfg.Listen, MaxConnections: cfg.MaxConnections, Containerd: cfg.Containerd,
		DefaultMemoryMiB: cfg.DefaultMemoryMiB, MaxMemoryMiB: cfg.MaxMemoryMiB,
	}, made...)
}

func hostOptions(cfg config.Config) host.Options {
	return host.Options{
		Hypervisor: cfg.Hypervisor, Accelerator: cfg.Accelerator, KataConfig: cfg.KataConfig, KataShim: cfg.KataShim,
		QEMU: cfg.QEMU, Virtiofsd: cfg.Virtiofsd, LibDir: cfg.LibDir, CacheDir: cfg.RunDir,
	}
}
