// Package peer identifies the local process and user at the other end of a Unix socket. It does not decide what that user
// may do.
package peer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	grpcpeer "google.golang.org/grpc/peer"
)

// Peer is the process at the other end of a connection, as the kernel recorded it when the process connected.
type Peer struct {
	credentials.CommonAuthInfo
	UID uint32
	// Groups are the effective group and the supplementary groups of the process.
	Groups []uint32
	// PID is the pid of the process when it connected. The process may have ended since then, and another process may
	// have got the pid. So rely on PID only while the peer is known to be alive, for example because it waits for the
	// response to a call.
	PID int32
}

// AuthType implements credentials.AuthInfo.
func (Peer) AuthType() string { return "peercred" }

// FromContext returns the peer that made the gRPC call with context ctx, on a server that uses Credentials.
func FromContext(ctx context.Context) (Peer, bool) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return Peer{}, false
	}
	caller, ok := p.AuthInfo.(Peer)
	return caller, ok
}

// Credentials returns credentials with which a gRPC server on a Unix socket gets the Peer of each connection. The
// server rejects a connection if it cannot determine the peer. Clients use insecure credentials.
func Credentials() credentials.TransportCredentials {
	return peerCredentials{insecure.NewCredentials()}
}

// peerCredentials sends nothing over the connection.
type peerCredentials struct {
	credentials.TransportCredentials
}

func (peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	p, err := Of(conn)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("read peer credentials: %w", err), conn.Close())
	}
	return conn, p, nil
}

func (c peerCredentials) Clone() credentials.TransportCredentials {
	return peerCredentials{c.TransportCredentials.Clone()}
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}

// Of returns the peer of a connection to a Unix socket.
func Of(conn net.Conn) (Peer, error) {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return Peer{}, fmt.Errorf("not a connection to a Unix socket: %T", conn)
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var cred *unix.Ucred
	var groups []uint32
	var optErr error
	if err := raw.Control(func(fd uintptr) {
		if cred, optErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); optErr == nil {
			groups, optErr = peerGroups(fd)
		}
	}); err != nil {
		return Peer{}, err
	}
	if optErr != nil {
		return Peer{}, optErr
	}
	return Peer{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		UID:            cred.Uid,
		Groups:         append(groups, cred.Gid),
		PID:            cred.Pid,
	}, nil
}

// peerGroups returns the supplementary groups of the peer of a socket.
func peerGroups(fd uintptr) ([]uint32, error) {
	groups := make([]uint32, 32)
	for {
		size := uint32(4 * len(groups))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == unix.ERANGE && int(size) > 4*len(groups): // the kernel set size to the size that it needs
			groups = make([]uint32, size/4)
		case errno != 0:
			return nil, fmt.Errorf("read groups: %w", errno)
		default:
			return groups[:size/4], nil
		}
	}
}
