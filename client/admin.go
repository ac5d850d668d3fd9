// Package client contains the clients of msbd. Admin is for local administrators and uses the admin socket.
// Client is for holders of an API key and uses HTTP.
//
// The package imports only the contracts in api, and no package of the daemon.
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

// DefaultSocket returns the default path of msbd's admin socket. It is /run/msb/msbd.sock, or, for users other
// than root, msb/msbd.sock in $XDG_RUNTIME_DIR, unless only the former exists.
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

// Admin is a local administrator's connection to msbd. The zero value is ready to use and connects to
// DefaultSocket on the first call. It is safe for concurrent use. Its fields must not be changed after the
// first call.
//
// Errors match the classes of github.com/containerd/errdefs. If no msbd listens on the socket, the error
// is ErrNotRunning.
type Admin struct {
	// Socket is the path of msbd's admin socket; empty means DefaultSocket.
	Socket string
	// Dial connects to the socket; nil means a Unix socket connection with net.Dialer.
	Dial func(ctx context.Context, socket string) (net.Conn, error)

	mu      sync.Mutex
	conn    *grpc.ClientConn
	dialErr error // the result of the last attempt to connect
}

// Close closes the connection, if it is open. The next call opens a new one.
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

// Status returns the server's status. It works in every state of the server.
func (a *Admin) Status(ctx context.Context) (*adminv1.GetStatusResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.GetStatus, &adminv1.GetStatusRequest{})
}

// CreateKey creates an API key. The response is the only place that ever contains the key. An older server
// ignores limits that it does not know and creates a key that may do more than requested; CreateKey detects
// that, does not return the key, and returns errdefs.ErrNotImplemented.
func (a *Admin) CreateKey(ctx context.Context, req *adminv1.CreateKeyRequest) (*adminv1.CreateKeyResponse, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.CreateKey, req)
	if err != nil {
		return nil, err
	}
	info := resp.GetInfo()
	if info.GetName() != req.GetName() || !sameSet(info.GetNamespaces(), req.GetNamespaces()) || !sameSet(info.GetScopes(), req.GetScopes()) {
		return nil, tooOld(fmt.Sprintf("created API key %s, but ignored some of the requested limits; the key was discarded, so nobody can use it", info.GetId()))
	}
	return resp, nil
}

// sameSet reports whether a and b contain the same values, regardless of order and duplicates.
func sameSet(a, b []string) bool {
	sorted := func(list []string) []string { return slices.Compact(slices.Sorted(slices.Values(list))) }
	return slices.Equal(sorted(a), sorted(b))
}

// Keys returns the API keys that match req, oldest first; a nil req means all keys. It requests page after
// page and ends after the first error.
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

// Key returns the API key that ref identifies. ref is the key's name, its id, or an unambiguous prefix of its
// id with at least 4 characters.
func (a *Admin) Key(ctx context.Context, ref string) (*adminv1.Key, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.GetKey, &adminv1.GetKeyRequest{Ref: ref})
	return resp.GetKey(), err
}

// RevokeKey permanently revokes the API key that ref identifies. The server refuses the key before RevokeKey
// returns.
func (a *Admin) RevokeKey(ctx context.Context, ref string) (*adminv1.Key, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.RevokeKey, &adminv1.RevokeKeyRequest{Ref: ref})
	return resp.GetKey(), err
}

// RotateKey creates an API key that replaces another one and has its name and limits. The old key is refused
// when the grace period is over.
func (a *Admin) RotateKey(ctx context.Context, req *adminv1.RotateKeyRequest) (*adminv1.RotateKeyResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.RotateKey, req)
}

// PruneKeys deletes the records of API keys that have been expired or revoked for at least deadFor, such as
// 30d, and returns them. An empty deadFor means all expired and revoked keys. With dryRun, it only returns
// what it would delete.
func (a *Admin) PruneKeys(ctx context.Context, deadFor string, dryRun bool) ([]*adminv1.Key, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.PruneKeys, &adminv1.PruneKeysRequest{DeadFor: deadFor, DryRun: dryRun})
	return resp.GetKeys(), err
}

// AcceptClock makes the server use the time of its host's clock, although it has used a later time before. With dryRun,
// it only returns what would change.
func (a *Admin) AcceptClock(ctx context.Context, dryRun bool) (*adminv1.AcceptClockResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.AcceptClock, &adminv1.AcceptClockRequest{DryRun: dryRun})
}

// Reset replaces the server's signing key. The server refuses every existing API key before Reset returns.
func (a *Admin) Reset(ctx context.Context) (*adminv1.ResetResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.Reset, &adminv1.ResetRequest{})
}

// Backup writes an archive of the API keys' records, the signing key and the audit log to w. The archive is
// complete only if the error is nil. It must be kept as secret as the signing key.
func (a *Admin) Backup(ctx context.Context, w io.Writer) error {
	return receive(ctx, a, adminv1.AdminServiceClient.Backup, &adminv1.BackupRequest{}, func(resp *adminv1.BackupResponse) error {
		_, err := w.Write(resp.GetChunk())
		return err
	})
}

// Restore reads an archive that Backup wrote from r and sends it to the server. The server changes nothing
// unless the archive is complete and r was read to the end without an error.
func (a *Admin) Restore(ctx context.Context, r io.Reader) (*adminv1.RestoreResponse, error) {
	// If reading fails, canceling ctx tells the server that the archive is incomplete.
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
			break // the server has ended the call; CloseAndRecv returns the reason
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

// TailAudit calls line with each of the last entries of the audit log, as written in the file. With follow,
// it continues with each new entry until ctx is done or the server stops. If line returns an error, TailAudit
// stops and returns it.
func (a *Admin) TailAudit(ctx context.Context, last int, follow bool, line func(string) error) error {
	req := &adminv1.TailAuditRequest{Last: int32(min(last, math.MaxInt32)), Follow: follow}
	return receive(ctx, a, adminv1.AdminServiceClient.TailAudit, req, func(resp *adminv1.TailAuditResponse) error {
		return line(resp.GetLine())
	})
}

// VerifyAudit asks the server to check its audit log. A damaged log is reported in the response, not as an
// error.
func (a *Admin) VerifyAudit(ctx context.Context) (*adminv1.VerifyAuditResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.VerifyAudit, &adminv1.VerifyAuditRequest{})
}

// SealAudit asks the server to seal the current file of its audit log, and returns the sealed segment. It returns nil if the
// log has no entries since it was last sealed.
func (a *Admin) SealAudit(ctx context.Context) (*adminv1.AuditSegment, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.SealAudit, &adminv1.SealAuditRequest{})
	return resp.GetSegment(), err
}

// AcknowledgeAudit removes the known problems of the audit log from the warnings of the status, and returns them.
func (a *Admin) AcknowledgeAudit(ctx context.Context) ([]string, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.AcknowledgeAudit, &adminv1.AcknowledgeAuditRequest{})
	return resp.GetProblems(), err
}

// Shutdown asks the server to stop. It returns before the process has exited. Sandboxes keep running unless
// stopSandboxes is set.
func (a *Admin) Shutdown(ctx context.Context, stopSandboxes bool) (*adminv1.ShutdownResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.Shutdown, &adminv1.ShutdownRequest{StopSandboxes: stopSandboxes})
}

// Sandboxes returns the sandboxes of a tenant namespace, or of all namespaces if namespace is empty.
func (a *Admin) Sandboxes(ctx context.Context, namespace string) ([]*adminv1.Sandbox, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.ListSandboxes, &adminv1.ListSandboxesRequest{Namespace: namespace})
	return resp.GetSandboxes(), err
}

// StopSandbox stops a sandbox. An empty namespace means the namespace default.
func (a *Admin) StopSandbox(ctx context.Context, namespace, name string) error {
	_, err := call(ctx, a, adminv1.AdminServiceClient.StopSandbox, &adminv1.StopSandboxRequest{Namespace: namespace, Name: name})
	return err
}

// ImportImage asks the server to import the images of an OCI archive. path is an absolute path on the
// server's host. progress, which may be nil, is called a few times a second as the import proceeds.
func (a *Admin) ImportImage(ctx context.Context, path string, progress func(*adminv1.ImportProgress)) (images []*adminv1.Image, err error) {
	req := &adminv1.ImportImageRequest{Path: path}
	err = receive(ctx, a, adminv1.AdminServiceClient.ImportImage, req, func(resp *adminv1.ImportImageResponse) error {
		if p := resp.GetProgress(); p != nil && progress != nil {
			progress(p)
		}
		images = append(images, resp.GetImages()...)
		return nil
	})
	return images, err
}

// Images returns the images that sandboxes can be started from.
func (a *Admin) Images(ctx context.Context) ([]*adminv1.Image, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.ListImages, &adminv1.ListImagesRequest{})
	return resp.GetImages(), err
}

// RemoveImage removes an image that no sandbox uses.
func (a *Admin) RemoveImage(ctx context.Context, name string) error {
	_, err := call(ctx, a, adminv1.AdminServiceClient.RemoveImage, &adminv1.RemoveImageRequest{Name: name})
	return err
}

// PoolStatus describes the microVMs that were started in advance.
func (a *Admin) PoolStatus(ctx context.Context) (*adminv1.PoolStatusResponse, error) {
	return call(ctx, a, adminv1.AdminServiceClient.PoolStatus, &adminv1.PoolStatusRequest{})
}

// SetPool sets how many microVMs of an image and size are started in advance. It returns both with the server's defaults.
func (a *Admin) SetPool(ctx context.Context, req *adminv1.SetPoolRequest) (*adminv1.PoolTemplate, error) {
	resp, err := call(ctx, a, adminv1.AdminServiceClient.SetPool, req)
	return resp.GetTemplate(), err
}

// call makes a unary call and converts its error with explain.
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

// receive makes a call with a streaming response and calls each with every message.
func receive[Req, Resp any](ctx context.Context, a *Admin,
	method func(adminv1.AdminServiceClient, context.Context, Req, ...grpc.CallOption) (grpc.ServerStreamingClient[Resp], error), req Req,
	each func(*Resp) error,
) error {
	ctx, cancel := context.WithCancel(ctx) // ends the stream on the server if each returns an error
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
		// The server is trusted, and some lists are sent in one message.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return a.dial(ctx, socket) }))
	if err != nil {
		return nil, err
	}
	a.conn = conn
	return conn, nil
}

// dial connects to the socket. It keeps its error in dialErr, because gRPC passes on only the text.
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
