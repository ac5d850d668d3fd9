package daemon

import (
	"context"

	"github.com/msbd/msbd/daemon/internal/backend"
	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/serve/localsock"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// Examine checks whether this host can run the server with the configuration cfg. The report starts with done, the checks
// that have already been made.
func Examine(ctx context.Context, cfg config.Config, done ...host.Check) host.Report {
	return host.Examine(ctx, backend.HostOptions(cfg), host.Server{
		StateDir: cfg.StateDir, Socket: cfg.SocketPath(), Group: localsock.Group,
		Listen: cfg.Listen, MaxConnections: cfg.MaxConnections, Containerd: cfg.Containerd,
		DefaultMemoryMiB: cfg.DefaultMemoryMiB, MaxMemoryMiB: cfg.MaxMemoryMiB,
	}, done...)
}
