// Package portal is the helper inside each sandbox. It runs code and commands for msbd.
//
// Serve is the container's main process. msbd reaches it over connections that the guest's agent hands over (see handedOver).
// With Kata's own driver, it does so over bridges (Connect). Only the programs msb-portal and msb-agent import this package.
//
// The portal obeys only msbd. A process of the sandbox must not start processes through the portal, nor replace msbd's
// connection, because it may have given up root, which the portal has. It cannot reach the agent's socket, and as a bridge it
// is refused (see checkBridge). A root process of the sandbox can still disturb the portal in other ways.
package portal

import (
	"context"
	"fmt"
	"math"
	"net"
	"os"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// Socket is the address at which Serve listens in a sandbox whose agent hands over no connections. It is an abstract socket,
// because that needs no writable file system and disappears with the sandbox.
const Socket = "@msb-portal"

const (
	// window is the gRPC flow-control window. It is the number of bytes that msbd may send before the portal reads them.
	window = 4 << 20
	// bufferSize is the size of the buffers between gRPC and the connection, in bytes. Large ones save system calls and wake-ups,
	// which take long in an emulated guest.
	bufferSize = 256 << 10
)

type server struct {
	portalv1.UnimplementedPortalServiceServer
	version  string
	programs *programs
	repls    *repls
}

// maxCalls is how many calls may run at a time.
const maxCalls = 1024

// Serve serves the portal's services until ctx is done, and then kills the processes that it started. It gets its connections
// from the guest's agent or, if that hands over none, at socket. It reaps every child of this process and every orphan among its
// descendants, so the caller must not wait for children.
func Serve(ctx context.Context, socket, version string) error {
	load, err := openLoad()
	if err != nil {
		return fmt.Errorf("open the cgroup of the load: %w", err)
	}
	defer load.close()
	connections, err := openConnections(&socket)
	if err != nil {
		return err
	}
	defer connections.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	// The processes that the portal starts must not inherit descriptors that were open when it was started.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return os.NewSyscallError("close_range", err)
	}
	discard, err := newDiscarder()
	if err != nil {
		return err
	}
	defer discard.close()
	children, err := adoptOrphans(load)
	if err != nil {
		return fmt.Errorf("adopt orphans: %w", err)
	}
	programs := &programs{children: children, discard: discard, null: null}
	srv := grpc.NewServer(
		grpc.InitialWindowSize(window),
		grpc.InitialConnWindowSize(window),
		grpc.ReadBufferSize(bufferSize),
		grpc.WriteBufferSize(bufferSize),
		grpc.MaxConcurrentStreams(maxCalls),
		grpc.StreamInterceptor(boundStreamErrors),
		grpc.UnaryInterceptor(boundErrors),
	)
	portalv1.RegisterPortalServiceServer(srv, &server{version: version, programs: programs, repls: &repls{programs: programs}})
	transfers := newTransfers()
	portalv1.RegisterFileServiceServer(srv, newFileServer(socket, transfers))
	portalv1.RegisterProcessServiceServer(srv, processService{programs: programs})
	stopped := make(chan struct{})
	context.AfterFunc(ctx, func() {
		defer close(stopped)
		children.kill()
		srv.Stop()
	})
	if err := srv.Serve(&listener{connections: connections, transfers: transfers}); err != nil {
		return err
	}
	<-stopped
	return nil
}

// openConnections returns the connections that the agent hands over or, if it hands over none, those to socket. In the first
// case, it sets socket to "".
func openConnections(socket *string) (connections, error) {
	agent, err := openAgentSocket()
	if err != nil {
		return nil, fmt.Errorf("open the agent's socket: %w", err)
	}
	if agent != nil {
		*socket = ""
		return &handedOver{agent: agent}, nil
	}
	l, err := net.Listen("unix", *socket)
	if err != nil {
		return nil, err
	}
	return bridges{l}, nil
}

// maxErrorText limits the text of an error, in bytes. An error may quote a request or what a program printed, and msbd
// accepts only short trailers.
const maxErrorText = 2 << 10

// boundError limits the text of err.
func boundError(err error) error {
	if s := status.Convert(err); len(s.Message()) > maxErrorText {
		return status.Error(s.Code(), bounded.Text(s.Message(), maxErrorText))
	}
	return err
}

// boundStreamErrors limits the text of the errors of streams.
func boundStreamErrors(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	return boundError(handler(srv, stream))
}

// boundErrors limits the text of the errors of other calls.
func boundErrors(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	return resp, boundError(err)
}

// contract is the version of the contract that PingResponse describes.
const contract = 6

// Ping implements portalv1.PortalServiceServer.
func (s *server) Ping(context.Context, *portalv1.PingRequest) (*portalv1.PingResponse, error) {
	return &portalv1.PingResponse{Version: s.version, Contract: contract}, nil
}
