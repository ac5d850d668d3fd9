package admin

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/sys/peer"
)

// access is the set of daemon states in which a method is served.
type access int

const (
	denied access = iota
	// always methods are served in every state, including while the daemon starts, recovers or drains.
	always
	// read methods are served once the daemon has recovered, even if it is degraded or draining.
	read
	// urgent methods are served once the daemon has recovered, even if it is degraded, because an administrator must be
	// able to revoke access, to free the disk and to correct the clock even then.
	urgent
	// mutate methods are served only while the daemon is ready.
	mutate
)

// methods lists every served method. A method that is not listed is denied.
var methods = map[string]access{
	adminv1.AdminService_GetStatus_FullMethodName:        always,
	adminv1.AdminService_Shutdown_FullMethodName:         always,
	adminv1.AdminService_ListKeys_FullMethodName:         read,
	adminv1.AdminService_GetKey_FullMethodName:           read,
	adminv1.AdminService_TailAudit_FullMethodName:        read,
	adminv1.AdminService_VerifyAudit_FullMethodName:      read,
	adminv1.AdminService_ListSandboxes_FullMethodName:    read,
	adminv1.AdminService_ListImages_FullMethodName:       read,
	adminv1.AdminService_PoolStatus_FullMethodName:       read,
	adminv1.AdminService_SetPool_FullMethodName:          mutate,
	adminv1.AdminService_RevokeKey_FullMethodName:        urgent,
	adminv1.AdminService_AcceptClock_FullMethodName:      urgent,
	adminv1.AdminService_Reset_FullMethodName:            urgent,
	adminv1.AdminService_CreateKey_FullMethodName:        mutate,
	adminv1.AdminService_RotateKey_FullMethodName:        mutate,
	adminv1.AdminService_PruneKeys_FullMethodName:        mutate,
	adminv1.AdminService_Backup_FullMethodName:           mutate,
	adminv1.AdminService_Restore_FullMethodName:          mutate,
	adminv1.AdminService_StopSandbox_FullMethodName:      urgent,
	adminv1.AdminService_SealAudit_FullMethodName:        mutate,
	adminv1.AdminService_AcknowledgeAudit_FullMethodName: mutate,
	adminv1.AdminService_ImportImage_FullMethodName:      mutate,
	adminv1.AdminService_RemoveImage_FullMethodName:      mutate,
}

var errStopping = fmt.Errorf("msbd is stopping: %w", errdefs.ErrUnavailable)

// intercept is the gRPC interceptor for unary calls.
func (s *Server) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	err = s.handle(ctx, info.FullMethod, func() (err error) {
		resp, err = handler(ctx, req)
		return err
	})
	return resp, err
}

// interceptStream returns the gRPC interceptor for streaming calls. It ends the streams of read methods when the context
// serving is canceled, because a client that follows the audit log would otherwise delay the daemon's exit.
func (s *Server) interceptStream(serving context.Context) grpc.StreamServerInterceptor {
	return func(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		return s.handle(stream.Context(), info.FullMethod, func() error {
			if methods[info.FullMethod] != read {
				return handler(server, stream)
			}
			ctx, cancel := context.WithCancelCause(stream.Context())
			defer cancel(nil)
			defer context.AfterFunc(serving, func() { cancel(errStopping) })()
			err := handler(server, contextStream{stream, ctx})
			if context.Cause(ctx) == errStopping {
				return errStopping
			}
			return err
		})
	}
}

// contextStream is a ServerStream with a different context.
type contextStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s contextStream) Context() context.Context { return s.ctx }

// handle authorizes a call, runs call, and converts the error to a gRPC status.
func (s *Server) handle(ctx context.Context, method string, call func() error) error {
	peer, known := s.PeerOf(ctx)
	if err := s.authorize(method, peer, known); err != nil {
		s.Log.Warn("admin call refused", "method", method, "uid", peer.UID, "err", err)
		return rpcerr.GRPC(err)
	}
	err := call()
	if err != nil && ctx.Err() == nil { // do not log calls that the client canceled
		s.Log.Warn("admin call failed", "method", method, "uid", peer.UID, "err", err)
	}
	return rpcerr.GRPC(err)
}

func (s *Server) authorize(method string, peer peer.Peer, known bool) error {
	need := methods[method]
	if need == denied {
		return fmt.Errorf("method %s is not served: %w", method, errdefs.ErrPermissionDenied)
	}
	if !known || !s.isAdministrator(peer) {
		return fmt.Errorf("only root, the user who runs msbd and members of the group %[1]s may administer msbd: run msb with sudo, or join "+
			"the group ('sudo usermod -aG %[1]s $USER', then log in again): %[2]w", s.Group, errdefs.ErrPermissionDenied)
	}
	return s.ready(need)
}

// isAdministrator reports whether peer may use the admin socket. It decides by user and group, never by pid, because a pid
// can be reused by another process.
func (s *Server) isAdministrator(peer peer.Peer) bool {
	if peer.UID == 0 || int(peer.UID) == os.Geteuid() {
		return true
	}
	group, err := user.LookupGroup(s.Group)
	if err != nil {
		return false
	}
	gid, err := strconv.ParseUint(group.Gid, 10, 32)
	return err == nil && slices.Contains(peer.Groups, uint32(gid))
}

// ready returns an error if methods with the access need are not served in the daemon's current state.
func (s *Server) ready(need access) error {
	if need == always {
		return nil
	}
	switch state, reasons := s.State(); {
	case state == adminv1.GetStatusResponse_DAEMON_STATE_STARTING,
		state == adminv1.GetStatusResponse_DAEMON_STATE_RECOVERING:
		return fmt.Errorf("msbd is starting; try again in a moment: %w", errdefs.ErrUnavailable)
	case need == read, state == adminv1.GetStatusResponse_DAEMON_STATE_READY:
		return nil
	case state == adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED:
		if need == urgent {
			return nil
		}
		return fmt.Errorf("msbd is degraded and accepts no changes except revoking keys, stopping sandboxes and accepting the clock (%s): %w",
			strings.Join(reasons, "; "), errdefs.ErrFailedPrecondition)
	default:
		return errStopping
	}
}
