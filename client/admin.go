// Package client talks to msbd. Admin is for local administrators, over the Unix socket; it imports
// only the contracts in api, and nothing of the daemon.
package client

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

const systemSocket = "/run/msb/msbd.sock"

// DefaultSocket is where msbd listens unless it was told otherwise: /run/msb/msbd.sock, or, for users
// other than root who run a msbd of their own, msb/msbd.sock in $XDG_RUNTIME_DIR.
func DefaultSocket() string {
	runtimeDir := os.Getenv("XDG_RUNTIME_DIR")
	if os.Geteuid() == 0 || runtimeDir == "" {
		return systemSocket
	}
	own := filepath.Join(runtimeDir, "msb", "msbd.sock")
	if _, err := os.Stat(own); err != nil {
		if _, err := os.Stat(systemSocket); err == nil {
			return systemSocket
		}
	}
	return own
}

// Admin is a local administrator's connection to msbd. The zero value is ready for use and connects
// to DefaultSocket at the first call. It is safe for concurrent use. Fields must not be changed
// after the first call.
//
// Errors are of the classes of github.com/containerd/errdefs. When no msbd listens on the socket, the
// error is ErrNotRunning.
type Admin struct {
	// Socket is the path of msbd's admin socket; empty means DefaultSocket.
	Socket string
	// Dial connects to the socket; nil means the operating system's way.
	Dial func(ctx context.Context, socket string) (net.Conn, error)

	mu      sync.Mutex
	conn    *grpc.ClientConn
	dialErr error // of the last attempt to connect
}

// Close ends the connection, if there is one. The next call makes a new one.
func (a *Admin) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conn == nil {
		return nil
	}
	err := a.conn.Close()
	a.conn = nil
	return err
}

// Status says how the server is, in every state of it.
func (a *Admin) Status(ctx context.Context) (*adminv1.GetStatusResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.GetStatus, &adminv1.GetStatusRequest{})
}

// CreateKey makes an API key. The key is in the answer and nowhere else.
func (a *Admin) CreateKey(ctx context.Context, req *adminv1.CreateKeyRequest) (*adminv1.CreateKeyResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.CreateKey, req)
}

// Reset replaces the server's signing key: every API key made before is refused when it returns.
func (a *Admin) Reset(ctx context.Context) (*adminv1.ResetResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.Reset, &adminv1.ResetRequest{})
}

// Shutdown makes the server end. It returns before the process has ended. Sandboxes go on running
// unless stopSandboxes.
func (a *Admin) Shutdown(ctx context.Context, stopSandboxes bool) (*adminv1.ShutdownResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.Shutdown, &adminv1.ShutdownRequest{StopSandboxes: stopSandboxes})
}

// Sandboxes lists the sandboxes of one tenant namespace, or of all if it is empty.
func (a *Admin) Sandboxes(ctx context.Context, namespace string) ([]*adminv1.Sandbox, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.ListSandboxes, &adminv1.ListSandboxesRequest{Namespace: namespace})
	return resp.GetSandboxes(), err
}

// StopSandbox stops a sandbox; an empty namespace means default.
func (a *Admin) StopSandbox(ctx context.Context, namespace, name string) error {
	_, err := call(ctx, a, adminv1.AdminServiceClient.StopSandbox, &adminv1.StopSandboxRequest{Namespace: namespace, Name: name})
	return err
}

// ImportImage has the server read an OCI archive; path is absolute and on the server's host.
func (a *Admin) ImportImage(ctx context.Context, path string) ([]*adminv1.Image, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.ImportImage, &adminv1.ImportImageRequest{Path: path})
	return resp.GetImages(), err
}

// Images lists what sandboxes can be started from.
func (a *Admin) Images(ctx context.Context) ([]*adminv1.Image, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.ListImages, &adminv1.ListImagesRequest{})
	return resp.GetImages(), err
}

// call makes one call and turns its error into one of this package.
func call[Req, Resp any](ctx context.Context, a *Admin,
	method func(adminv1.AdminServiceClient, context.Context, Req, ...grpc.CallOption) (Resp, error), req Req,
) (resp Resp, err error) {
	conn, err := a.connection()
	if err != nil {
		return resp, err
	}
	resp, err = method(adminv1.NewAdminServiceClient(conn), ctx, req)
	if err != nil {
		return resp, a.explain(err)
	}
	return resp, nil
}

func (a *Admin) socket() string {
	if a.Socket != "" {
		return a.Socket
	}
	return DefaultSocket()
}

func (a *Admin) connection() (*grpc.ClientConn, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conn != nil {
		return a.conn, nil
	}
	socket := a.socket()
	conn, err := grpc.NewClient("passthrough:msbd",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return a.dial(ctx, socket) }))
	if err != nil {
		return nil, err
	}
	a.conn = conn
	return conn, nil
}

// dial remembers its error, of which gRPC passes on only the text.
func (a *Admin) dial(ctx context.Context, socket string) (conn net.Conn, err error) {
	if a.Dial != nil {
		conn, err = a.Dial(ctx, socket)
	} else {
		conn, err = new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.dialErr = err
	return conn, err
}
