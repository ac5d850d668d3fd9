// Package containerd connects to the containerd that stores images and runs tasks, and supervises the server's private
// containerd. It knows nothing about Kata or the contents of tasks. It is a base package: every package of backend may
// import it.
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
	// Namespace is the containerd namespace of all images, containers and tasks of this server.
	Namespace = "msb"
	// Snapshotter is the name of the snapshotter for images and for the writable layers of sandboxes.
	Snapshotter = "overlayfs"
)

// InNamespace returns a context for containerd client calls in Namespace.
func InNamespace(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, Namespace)
}

// Paths holds the paths of a containerd on this host.
type Paths struct {
	Address string // its Unix socket
	Root    string // persistent data: images, snapshots
	State   string // data lost at a reboot: tasks, bundles
}

// SystemPaths returns the paths of the host's containerd: containerd's default directories, and address as its socket.
func SystemPaths(address string) Paths {
	return Paths{Address: address, Root: defaults.DefaultRootDir, State: defaults.DefaultStateDir}
}

// LogFile returns the log file of the private containerd and its shims. Each start of containerd truncates it.
func (p Paths) LogFile() string { return filepath.Join(p.Root, "containerd.log") }

// TaskDirs returns containerd's directories for a task in Namespace.
func (p Paths) TaskDirs(id string) []string {
	const tasks = "io.containerd.runtime.v2.task"
	return []string{filepath.Join(p.State, tasks, Namespace, id), filepath.Join(p.Root, tasks, Namespace, id)}
}

// Dial returns a client for the containerd at a Unix socket. It connects at the first call, and reconnects whenever the
// connection is lost.
func Dial(address string) (*containerd.Client, error) {
	retry := backoff.DefaultConfig
	retry.BaseDelay, retry.MaxDelay = 50*time.Millisecond, time.Second
	conn, err := grpc.NewClient("unix://"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry, MinConnectTimeout: 10 * time.Second}), // long enough on a busy host
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxCallSendMsgSize(defaults.DefaultMaxSendMsgSize)))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", address, err)
	}
	return containerd.NewWithConn(conn)
}

// WaitServing waits until the client's containerd is serving. If ctx ends first, it returns the cause of ctx.
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
