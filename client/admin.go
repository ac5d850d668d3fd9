// Package client talks to msbd: Admin for local administrators, over the Unix socket; Client for holders
// of an API key, over HTTP. It imports only the contracts in api, and nothing of the daemon.
package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

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

// CreateKey makes an API key. The key is in the answer and nowhere else. A server that is too old for
// what was asked would make a key that may do more: its answer is errdefs.ErrNotImplemented.
func (a *Admin) CreateKey(ctx context.Context, req *adminv1.CreateKeyRequest) (*adminv1.CreateKeyResponse, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.CreateKey, req)
	if err != nil {
		return nil, err
	}
	info := resp.GetInfo()
	if info.GetName() != req.GetName() || !sameSet(info.GetNamespaces(), req.GetNamespaces()) || !sameSet(info.GetScopes(), req.GetScopes()) {
		return nil, tooOld(fmt.Sprintf("made API key %s otherwise than was asked; it is not shown, so that nobody has it", info.GetId()))
	}
	return resp, nil
}

// sameSet says whether two lists hold the same, in any order.
func sameSet(a, b []string) bool {
	sorted := func(list []string) []string { return slices.Compact(slices.Sorted(slices.Values(list))) }
	return slices.Equal(sorted(a), sorted(b))
}

// Keys lists API keys, the oldest first; req may be nil. It asks for page after page; an error ends it.
func (a *Admin) Keys(ctx context.Context, req *adminv1.ListKeysRequest) iter.Seq2[*adminv1.Key, error] {
	return func(yield func(*adminv1.Key, error) bool) {
		req := cmp.Or(proto.CloneOf(req), new(adminv1.ListKeysRequest))
		for {
			page, err := call(ctx, a, adminv1.AdminServiceClient.ListKeys, req)
			if err != nil {
				yield(nil, err)
				return
			}
			for _, key := range page.GetKeys() {
				if !yield(key, nil) {
					return
				}
			}
			if page.GetNextPageToken() == "" {
				return
			}
			req.PageToken = page.GetNextPageToken()
		}
	}
}

// Key finds the API key that ref names: its id, an unambiguous beginning of that of at least 4
// characters, or its name.
func (a *Admin) Key(ctx context.Context, ref string) (*adminv1.Key, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.GetKey, &adminv1.GetKeyRequest{Ref: ref})
	return resp.GetKey(), err
}

// RevokeKey refuses the API key that ref names, for good, from before it returns.
func (a *Admin) RevokeKey(ctx context.Context, ref string) (*adminv1.Key, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.RevokeKey, &adminv1.RevokeKeyRequest{Ref: ref})
	return resp.GetKey(), err
}

// RotateKey makes an API key like another one, which is refused once the grace period is over.
func (a *Admin) RotateKey(ctx context.Context, req *adminv1.RotateKeyRequest) (*adminv1.RotateKeyResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.RotateKey, req)
}

// PruneKeys removes the records of API keys that have been expired or revoked for so long, such as 30d,
// or, if deadFor is empty, for any time, and returns them. With dryRun it changes nothing.
func (a *Admin) PruneKeys(ctx context.Context, deadFor string, dryRun bool) ([]*adminv1.Key, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.PruneKeys, &adminv1.PruneKeysRequest{DeadFor: deadFor, DryRun: dryRun})
	return resp.GetKeys(), err
}

// Reset replaces the server's signing key: every API key made before is refused when it returns.
func (a *Admin) Reset(ctx context.Context) (*adminv1.ResetResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.Reset, &adminv1.ResetRequest{})
}

// Backup writes an archive of the keys, the signing key and the audit log to w. It is whole only if
// the error is nil, and as secret as the signing key.
func (a *Admin) Backup(ctx context.Context, w io.Writer) error {
	return receive(ctx, a, adminv1.AdminServiceClient.Backup, &adminv1.BackupRequest{}, func(resp *adminv1.BackupResponse) error {
		_, err := w.Write(resp.GetChunk())
		return err
	})
}

// Restore sends the archive of a Backup. The server changes nothing unless it is whole, and read from r
// without an error.
func (a *Admin) Restore(ctx context.Context, r io.Reader) (*adminv1.RestoreResponse, error) {
	// Until the server is told that it has everything, the end of ctx tells it that it has not.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := a.connection()
	if err != nil {
		return nil, err
	}
	stream, err := adminv1.NewAdminServiceClient(conn).Restore(ctx)
	if err != nil {
		return nil, a.explain(err)
	}
	chunk := make([]byte, 64<<10)
	for {
		n, err := r.Read(chunk)
		if n > 0 && stream.Send(&adminv1.RestoreRequest{Chunk: chunk[:n]}) != nil {
			break // the server has ended the call, and says why below
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read the backup: %w", err)
		}
	}
	resp, err := stream.CloseAndRecv()
	if err != nil {
		return nil, a.explain(err)
	}
	return resp, nil
}

// TailAudit calls line with each of the last entries of the audit log, as they are in the file, and
// with follow with each new one, until ctx ends, the server does, or line returns an error, which is
// TailAudit's then.
func (a *Admin) TailAudit(ctx context.Context, last int, follow bool, line func(string) error) error {
	req := &adminv1.TailAuditRequest{Last: int32(min(last, math.MaxInt32)), Follow: follow}
	return receive(ctx, a, adminv1.AdminServiceClient.TailAudit, req, func(resp *adminv1.TailAuditResponse) error {
		return line(resp.GetLine())
	})
}

// VerifyAudit has the server check its audit log. A broken one is in the answer, not an error.
func (a *Admin) VerifyAudit(ctx context.Context) (*adminv1.VerifyAuditResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.VerifyAudit, &adminv1.VerifyAuditRequest{})
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

// receive makes one call that is answered by a stream, and hands on each message of it.
func receive[Req, Resp any](ctx context.Context, a *Admin,
	method func(adminv1.AdminServiceClient, context.Context, Req, ...grpc.CallOption) (grpc.ServerStreamingClient[Resp], error), req Req,
	each func(*Resp) error,
) error {
	ctx, cancel := context.WithCancel(ctx) // so that the server stops when each has had enough
	defer cancel()
	stream, err := call(ctx, a, method, req)
	if err != nil {
		return err
	}
	for {
		resp, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return a.explain(err)
		}
		if err := each(resp); err != nil {
			return err
		}
	}
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
		// The server is trusted, and some lists come in one message.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
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
