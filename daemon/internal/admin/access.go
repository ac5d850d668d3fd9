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
	"github.com/msbd/msbd/daemon/internal/rpcerr"
)

// Peer is the local user at the other end of a call.
type Peer struct {
	UID, GID uint32
}

// access says in which states of the daemon a method is answered.
type access int

const (
	denied access = iota
	// always: also while the daemon starts, recovers and drains.
	always
	// read: once it has recovered, also when it is degraded or drains.
	read
	// mutate: only when it is ready.
	mutate
)

// methods is the whole of what is served: a method that is not here is denied.
var methods = map[string]access{
	adminv1.AdminService_GetStatus_FullMethodName:     always,
	adminv1.AdminService_Shutdown_FullMethodName:      always,
	adminv1.AdminService_ListSandboxes_FullMethodName: read,
	adminv1.AdminService_ListImages_FullMethodName:    read,
	adminv1.AdminService_CreateKey_FullMethodName:     mutate,
	adminv1.AdminService_Reset_FullMethodName:         mutate,
	adminv1.AdminService_StopSandbox_FullMethodName:   mutate,
	adminv1.AdminService_ImportImage_FullMethodName:   mutate,
}

// intercept authorises a call and turns its error into a status.
func (s *Server) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	peer, known := s.PeerOf(ctx)
	if err := s.admit(info.FullMethod, peer, known); err != nil {
		s.Log.Warn("admin call refused", "method", info.FullMethod, "uid", peer.UID, "err", err)
		return nil, rpcerr.GRPC(err)
	}
	resp, err := handler(ctx, req)
	if err != nil {
		s.Log.Warn("admin call failed", "method", info.FullMethod, "uid", peer.UID, "err", err)
	}
	return resp, rpcerr.GRPC(err)
}

func denyStream(_ any, _ grpc.ServerStream, info *grpc.StreamServerInfo, _ grpc.StreamHandler) error {
	return rpcerr.GRPC(fmt.Errorf("method %s is not served: %w", info.FullMethod, errdefs.ErrPermissionDenied))
}

func (s *Server) admit(method string, peer Peer, known bool) error {
	need := methods[method]
	if need == denied {
		return fmt.Errorf("method %s is not served: %w", method, errdefs.ErrPermissionDenied)
	}
	if !known || !s.mayAdminister(peer) {
		return fmt.Errorf("only root, the user who runs msbd and members of group %s may use the admin socket: %w",
			s.Group, errdefs.ErrPermissionDenied)
	}
	return s.ready(need)
}

// mayAdminister goes by user and group, never by pid, which can change hands.
func (s *Server) mayAdminister(peer Peer) bool {
	if peer.UID == 0 || int(peer.UID) == os.Geteuid() {
		return true
	}
	group, err := user.LookupGroup(s.Group)
	if err != nil {
		return false
	}
	if group.Gid == strconv.FormatUint(uint64(peer.GID), 10) {
		return true
	}
	// The kernel tells only the peer's effective group.
	u, err := user.LookupId(strconv.FormatUint(uint64(peer.UID), 10))
	if err != nil {
		return false
	}
	groups, err := u.GroupIds()
	return err == nil && slices.Contains(groups, group.Gid)
}

func (s *Server) ready(need access) error {
	if need == always {
		return nil
	}
	status := s.Status()
	switch state := status.GetState(); {
	case state == adminv1.GetStatusResponse_DAEMON_STATE_STARTING,
		state == adminv1.GetStatusResponse_DAEMON_STATE_RECOVERING:
		return fmt.Errorf("msbd is starting; try again in a moment: %w", errdefs.ErrUnavailable)
	case need == read, state == adminv1.GetStatusResponse_DAEMON_STATE_READY:
		return nil
	case state == adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED:
		return fmt.Errorf("msbd is degraded and changes nothing (%s): %w",
			strings.Join(status.GetDegradedReasons(), "; "), errdefs.ErrFailedPrecondition)
	default:
		return fmt.Errorf("msbd is stopping: %w", errdefs.ErrUnavailable)
	}
}
