package daemon

import (
	"context"

	"github.com/msbd/msbd/daemon/internal/backend"
	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/serve/localsock"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// Examine says what this host is good for as it is configured, after the checks that were made already.
func Examine(ctx context.Context, cfg config.Config, made ...host.Check) host.Report {
	return host.Examine(ctx, backend.HostOptions(cfg), host.Server{
		StateDir: cfg.StateDir, Socket: cfg.SocketPath(), Group: localsock.Group,
		Listen: cfg.Listen, MaxConnections: cfg.MaxConnections, Containerd: cfg.Containerd,
		DefaultMemoryMiB: cfg.DefaultMemoryMiB, MaxMemoryMiB: cfg.MaxMemoryMiB,
	}, made...)
}
