// Package admin serves the admin socket's gRPC API: each method is a few lines over the token and
// sandbox domains. Its interceptor decides, by one table, who may call what and when. Only the wiring
// enters.
package admin

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/sandbox"
	"github.com/msbd/msbd/daemon/internal/token"
)

// Keys issues API keys. A *token.Issuer is one.
type Keys interface {
	Issue(ctx context.Context, req token.IssueRequest) (token.Secret, token.Record, error)
	Reset(ctx context.Context) (invalidated int, err error)
	SigningKey() token.SigningKey
}

// Sandboxes lists and stops sandboxes. A *sandbox.Manager is one.
type Sandboxes interface {
	// List returns the sandboxes of one tenant namespace, or of all if it is empty.
	List(namespace string) []sandbox.Record
	Stop(ctx context.Context, name sandbox.Name) error
	// StopAll stops every sandbox and says how many.
	StopAll(ctx context.Context) (int, error)
}

// Images holds what sandboxes can be started from.
type Images interface {
	// Import reads an OCI archive on this host.
	Import(ctx context.Context, path string) ([]Image, error)
	List(ctx context.Context) ([]Image, error)
}

// Image is an image as administrators see it.
type Image struct {
	Name   string
	Digest digest.Digest
	// Size of the compressed content, in bytes.
	Size    int64
	Created time.Time
}

// Options is what a Server is made of.
type Options struct {
	Keys      Keys
	Sandboxes Sandboxes
	Images    Images
	// Status describes the daemon; it is called in every state of it and must not block.
	Status func() *adminv1.GetStatusResponse
	// Shutdown makes the daemon end, and with it the context of Serve. It does not wait.
	Shutdown func()
	// Credentials read who is at the other end of a connection; PeerOf tells it of a call.
	Credentials credentials.TransportCredentials
	PeerOf      func(ctx context.Context) (Peer, bool)
	// Group is the Unix group whose members may do everything here, beside root and the daemon's own
	// user. The host need not have it.
	Group string
	Log   *slog.Logger
}

// Server implements the AdminService.
type Server struct {
	adminv1.UnimplementedAdminServiceServer
	Options
}

// New makes a Server.
func New(o Options) *Server { return &Server{Options: o} }

// drainTimeout is how long calls in progress may go on when the daemon ends.
const drainTimeout = 5 * time.Second

// Serve answers calls on l until ctx ends, then lets those in progress finish, and closes l. It can be
// called before the daemon is ready: only what Status says is ready is served.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	g := grpc.NewServer(
		grpc.Creds(s.Credentials),
		grpc.UnaryInterceptor(s.intercept),
		grpc.StreamInterceptor(denyStream),
		grpc.MaxRecvMsgSize(1<<20))
	adminv1.RegisterAdminServiceServer(g, s)
	drained := make(chan struct{})
	stopDraining := context.AfterFunc(ctx, func() {
		defer close(drained)
		limit := time.AfterFunc(drainTimeout, g.Stop)
		defer limit.Stop()
		g.GracefulStop()
	})
	err := g.Serve(l)
	if stopDraining() {
		return fmt.Errorf("serve admin socket: %w", err) // nobody asked it to end
	}
	<-drained
	return nil
}

// GetStatus implements AdminServiceServer.
func (s *Server) GetStatus(context.Context, *adminv1.GetStatusRequest) (*adminv1.GetStatusResponse, error) {
	return s.Status(), nil
}

// CreateKey implements AdminServiceServer.
func (s *Server) CreateKey(ctx context.Context, req *adminv1.CreateKeyRequest) (*adminv1.CreateKeyResponse, error) {
	peer, _ := s.PeerOf(ctx) // the interceptor knows it
	secret, record, err := s.Keys.Issue(ctx, token.IssueRequest{
		Expire:    req.GetExpire(),
		Namespace: req.GetNamespace(),
		CreatedBy: peer.UID,
	})
	if err != nil {
		return nil, err
	}
	info := &adminv1.Key{
		Id:        record.ID,
		Namespace: record.Namespace,
		CreatedAt: timestamppb.New(record.CreatedAt),
	}
	expires := "never"
	if !record.ExpiresAt.IsZero() {
		info.ExpiresAt = timestamppb.New(record.ExpiresAt)
		expires = record.ExpiresAt.Format(time.RFC3339)
	}
	s.Log.Info("API key made", "key_id", record.ID, "namespace", record.Namespace, "expires", expires, "uid", peer.UID)
	return &adminv1.CreateKeyResponse{Key: secret.Reveal(), Info: info}, nil
}

// Reset implements AdminServiceServer.
func (s *Server) Reset(ctx context.Context, _ *adminv1.ResetRequest) (*adminv1.ResetResponse, error) {
	invalidated, err := s.Keys.Reset(ctx)
	if err != nil {
		return nil, err
	}
	return &adminv1.ResetResponse{SigningKeyId: s.Keys.SigningKey().ID, Invalidated: int32(invalidated)}, nil
}

// Shutdown implements AdminServiceServer. If a sandbox cannot be stopped, the daemon stays.
func (s *Server) Shutdown(ctx context.Context, req *adminv1.ShutdownRequest) (*adminv1.ShutdownResponse, error) {
	var stopped, left int
	if req.GetStopSandboxes() {
		var err error
		if stopped, err = s.Sandboxes.StopAll(ctx); err != nil {
			return nil, err
		}
	}
	for _, r := range s.Sandboxes.List("") {
		if r.State != sandbox.Failed {
			left++
		}
	}
	s.Options.Shutdown()
	return &adminv1.ShutdownResponse{SandboxesStopped: int32(stopped), SandboxesLeftRunning: int32(left)}, nil
}

// ListSandboxes implements AdminServiceServer.
func (s *Server) ListSandboxes(_ context.Context, req *adminv1.ListSandboxesRequest) (*adminv1.ListSandboxesResponse, error) {
	if ns := req.GetNamespace(); ns != "" {
		if err := sandbox.ValidateName("namespace", ns); err != nil {
			return nil, err
		}
	}
	resp := new(adminv1.ListSandboxesResponse)
	for _, r := range s.Sandboxes.List(req.GetNamespace()) {
		resp.Sandboxes = append(resp.Sandboxes, &adminv1.Sandbox{
			Namespace: r.Name.Namespace,
			Name:      r.Name.Name,
			Id:        r.ID,
			State:     string(r.State),
			Reason:    strings.TrimSuffix(r.Reason+": "+r.Cause, ": "),
			Image:     r.Config.Image,
			Cpus:      int32(r.Config.CPUs),
			MemoryMib: int32(r.Config.MemoryMiB),
			CreatedAt: timestamppb.New(r.CreatedAt),
		})
	}
	return resp, nil
}

// StopSandbox implements AdminServiceServer.
func (s *Server) StopSandbox(ctx context.Context, req *adminv1.StopSandboxRequest) (*adminv1.StopSandboxResponse, error) {
	name := sandbox.Name{Namespace: req.GetNamespace(), Name: req.GetName()}
	if name.Namespace == "" {
		name.Namespace = sandbox.DefaultNamespace
	}
	if err := name.Validate(); err != nil {
		return nil, err
	}
	if err := s.Sandboxes.Stop(ctx, name); err != nil {
		return nil, err
	}
	return new(adminv1.StopSandboxResponse), nil
}

// ImportImage implements AdminServiceServer.
func (s *Server) ImportImage(ctx context.Context, req *adminv1.ImportImageRequest) (*adminv1.ImportImageResponse, error) {
	images, err := s.Images.Import(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	return &adminv1.ImportImageResponse{Images: imagesToProto(images)}, nil
}

// ListImages implements AdminServiceServer.
func (s *Server) ListImages(ctx context.Context, _ *adminv1.ListImagesRequest) (*adminv1.ListImagesResponse, error) {
	images, err := s.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	return &adminv1.ListImagesResponse{Images: imagesToProto(images)}, nil
}

func imagesToProto(images []Image) []*adminv1.Image {
	out := make([]*adminv1.Image, 0, len(images))
	for _, i := range images {
		out = append(out, &adminv1.Image{
			Name:      i.Name,
			Digest:    i.Digest.String(),
			SizeBytes: i.Size,
			CreatedAt: timestamppb.New(i.Created),
		})
	}
	return out
}
