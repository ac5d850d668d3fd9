// Package containerd connects to the containerd that keeps images and tasks, and supervises the server's private one. It
// knows nothing of Kata or of what runs in the tasks. It is a base package: every package of backend may import it.
package containerd

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/defaults"
	"github.com/containerd/containerd/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	// Namespace is the containerd namespace that holds everything that this server keeps in a containerd.
	Namespace = "msb"
	// Snapshotter is the name of containerd's snapshotter, for images and for what sandboxes write over them.
	Snapshotter = "overlayfs"
)

// InNamespace returns ctx for calls of a client in Namespace.
func InNamespace(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, Namespace)
}

// Paths say where a containerd is on this host.
type Paths struct {
	Address string // its Unix socket
	Root    string // persistent: images, snapshots
	State   string // gone after a reboot: tasks, bundles
}

// SystemPaths returns the paths of a containerd that is not the server's own: the default ones, except for its socket.
func SystemPaths(address string) Paths {
	return Paths{Address: address, Root: defaults.DefaultRootDir, State: defaults.DefaultStateDir}
}

// LogFile is where the private containerd, and with it the shims, write their logs. Each start truncates it.
func (p Paths) LogFile() string { return filepath.Join(p.Root, "containerd.log") }

// TaskDirs returns the directories that containerd has for a task in Namespace.
func (p Paths) TaskDirs(id string) []string {
	const tasks = "io.containerd.runtime.v2.task"
	return []string{filepath.Join(p.State, tasks, Namespace, id), filepath.Join(p.Root, tasks, Namespace, id)}
}

// Dial returns a client of the containerd at a Unix socket. It connects at the first call, and again whenever containerd
// was away.
func Dial(address string) (*containerd.Client, error) {
	retry := backoff.DefaultConfig
	retry.BaseDelay, retry.MaxDelay = 50*time.Millisecond, time.Second
	conn, err := grpc.NewClient("unix://"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry, MinConnectTimeout: 10 * time.Second}), // of a busy host
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxCallSendMsgSize(defaults.DefaultMaxSendMsgSize)))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", address, err)
	}
	return containerd.NewWithConn(conn)
}

// WaitServing returns when the client's containerd answers, or with ctx's cause.
func WaitServing(ctx context.Context, client *containerd.Client) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if serving, err := client.IsServing(ctx); err == nil && serving {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
