// Package peer tells which local user is at the other end of a Unix socket. It decides nothing about what
// that user may do.
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

// Peer is the process at the other end of a connection, as the kernel saw it when it connected.
type Peer struct {
	credentials.CommonAuthInfo
	UID uint32
	// Groups are its effective group and its supplementary ones.
	Groups []uint32
	// PID may have been given to another process by now: take hold of it, and look again, before you believe it.
	PID int32
}

// AuthType implements credentials.AuthInfo.
func (Peer) AuthType() string { return "peercred" }

// FromContext returns who made the gRPC call that ctx belongs to, on a server that uses Credentials.
func FromContext(ctx context.Context) (Peer, bool) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return Peer{}, false
	}
	from, ok := p.AuthInfo.(Peer)
	return from, ok
}

// Credentials lets a gRPC server on a Unix socket learn the Peer of each connection. It refuses a connection
// whose peer is unknown. Clients use insecure credentials.
func Credentials() credentials.TransportCredentials {
	return peerCredentials{insecure.NewCredentials()}
}

// peerCredentials adds nothing to the bytes on the wire.
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
		return Peer{}, fmt.Errorf("not a Unix socket but %T", conn)
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
		case errno == unix.ERANGE && int(size) > 4*len(groups): // it says how much it takes
			groups = make([]uint32, size/4)
		case errno != 0:
			return nil, fmt.Errorf("read groups: %w", errno)
		default:
			return groups[:size/4], nil
		}
	}
}
