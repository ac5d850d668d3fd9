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

// access says in which states of the daemon a method is answered.
type access int

const (
	denied access = iota
	// always: also while the daemon starts, recovers and drains.
	always
	// read: once it has recovered, also when it is degraded or drains.
	read
	// revoke: once it has recovered, also when it is degraded: what takes access away is tried even
	// then, and fails by itself if it cannot be made durable.
	revoke
	// mutate: only when it is ready.
	mutate
)

// methods is the whole of what is served: a method that is not here is denied.
var methods = map[string]access{
	adminv1.AdminService_GetStatus_FullMethodName:     always,
	adminv1.AdminService_Shutdown_FullMethodName:      always,
	adminv1.AdminService_ListKeys_FullMethodName:      read,
	adminv1.AdminService_GetKey_FullMethodName:        read,
	adminv1.AdminService_TailAudit_FullMethodName:     read,
	adminv1.AdminService_VerifyAudit_FullMethodName:   read,
	adminv1.AdminService_ListSandboxes_FullMethodName: read,
	adminv1.AdminService_ListImages_FullMethodName:    read,
	adminv1.AdminService_RevokeKey_FullMethodName:     revoke,
	adminv1.AdminService_Reset_FullMethodName:         revoke,
	adminv1.AdminService_CreateKey_FullMethodName:     mutate,
	adminv1.AdminService_RotateKey_FullMethodName:     mutate,
	adminv1.AdminService_PruneKeys_FullMethodName:     mutate,
	adminv1.AdminService_Backup_FullMethodName:        mutate,
	adminv1.AdminService_Restore_FullMethodName:       mutate,
	adminv1.AdminService_StopSandbox_FullMethodName:   mutate,
	adminv1.AdminService_ImportImage_FullMethodName:   mutate,
}

var errStopping = fmt.Errorf("msbd is stopping: %w", errdefs.ErrUnavailable)

// intercept is the way of every call.
func (s *Server) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	err = s.answer(ctx, info.FullMethod, func() (err error) {
		resp, err = handler(ctx, req)
		return err
	})
	return resp, err
}

// interceptStream is the way of every streaming call. One that only tells ends when serving does:
// whoever follows would keep the daemon from its end.
func (s *Server) interceptStream(serving context.Context) grpc.StreamServerInterceptor {
	return func(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		return s.answer(stream.Context(), info.FullMethod, func() error {
			if methods[info.FullMethod] != read {
				return handler(server, stream)
			}
			ctx, cancel := context.WithCancelCause(stream.Context())
			defer cancel(nil)
			defer context.AfterFunc(serving, func() { cancel(errStopping) })()
			err := handler(server, streamIn{stream, ctx})
			if context.Cause(ctx) == errStopping {
				return errStopping
			}
			return err
		})
	}
}

// streamIn is a stream in a context of its own.
type streamIn struct {
	grpc.ServerStream
	ctx context.Context
}

func (s streamIn) Context() context.Context { return s.ctx }

// answer authorises a call, has it handled and turns its error into a status.
func (s *Server) answer(ctx context.Context, method string, handle func() error) error {
	peer, known := s.PeerOf(ctx)
	if err := s.admit(method, peer, known); err != nil {
		s.Log.Warn("admin call refused", "method", method, "uid", peer.UID, "err", err)
		return rpcerr.GRPC(err)
	}
	err := handle()
	if err != nil && ctx.Err() == nil { // else the caller ended it
		s.Log.Warn("admin call failed", "method", method, "uid", peer.UID, "err", err)
	}
	return rpcerr.GRPC(err)
}

func (s *Server) admit(method string, peer peer.Peer, known bool) error {
	need := methods[method]
	if need == denied {
		return fmt.Errorf("method %s is not served: %w", method, errdefs.ErrPermissionDenied)
	}
	if !known || !s.mayAdminister(peer) {
		return fmt.Errorf("only root, the user who runs msbd and members of group %[1]s may administer it: use sudo, or have yourself "+
			"added to the group ('sudo usermod -aG %[1]s $USER', then log in again): %[2]w", s.Group, errdefs.ErrPermissionDenied)
	}
	return s.ready(need)
}

// mayAdminister goes by user and group, never by pid, which can change hands.
func (s *Server) mayAdminister(peer peer.Peer) bool {
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
		if need == revoke {
			return nil
		}
		return fmt.Errorf("msbd is degraded and changes nothing, but for revoking keys (%s): %w",
			strings.Join(reasons, "; "), errdefs.ErrFailedPrecondition)
	default:
		return errStopping
	}
}
