package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

// standIn answers as msbd would, without sandboxes behind it.
type standIn struct {
	adminv1.UnimplementedAdminServiceServer
	port     string
	dev      bool
	shutdown func()
	began    time.Time

	mu        sync.Mutex
	live      int32
	signing   int
	sandboxes []*adminv1.Sandbox
}

// serveStandIn serves until it is told to end.
func serveStandIn(runDir, port string, dev, resetKey bool) error {
	if port == "1" {
		return errors.New("listen tcp 127.0.0.1:1: bind: address already in use")
	}
	if err := os.MkdirAll(runDir, 0o750); err != nil {
		return err
	}
	l, err := net.Listen("unix", filepath.Join(runDir, "msbd.sock"))
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	g := grpc.NewServer()
	s := &standIn{
		port: port, dev: dev, shutdown: stop, began: time.Now(),
		sandboxes: []*adminv1.Sandbox{
			{Namespace: "default", Name: "my-env", Id: "a1", State: "running", Image: "microsandbox/python", Cpus: 1, MemoryMib: 512, CreatedAt: timestamppb.Now()},
			{Namespace: "team", Name: "broken", Id: "b2", State: "failed", Reason: "its microVM ended", Image: "microsandbox/node", Cpus: 2, MemoryMib: 1024, CreatedAt: timestamppb.Now()},
		},
	}
	if resetKey {
		s.signing = 100
	}
	adminv1.RegisterAdminServiceServer(g, s)
	ended := context.AfterFunc(ctx, g.GracefulStop)
	defer ended()
	return g.Serve(l)
}

func (s *standIn) GetStatus(context.Context, *adminv1.GetStatusRequest) (*adminv1.GetStatusResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	state := adminv1.GetStatusResponse_DAEMON_STATE_READY
	var reasons []string
	if s.port == "2" {
		state, reasons = adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED, []string{"the disk is full"}
	}
	return &adminv1.GetStatusResponse{
		State: state, DegradedReasons: reasons, Version: "1.2.3", Pid: int32(os.Getpid()), StartedAt: timestamppb.New(s.began),
		ListenAddress: "127.0.0.1:" + s.port, AuthRequired: !s.dev, DevMode: s.dev, InstanceId: "instance",
		SigningKeyId: fmt.Sprintf("key-%d", s.signing), SigningKeyCreatedAt: timestamppb.New(s.began),
		Keys:      &adminv1.KeyCounts{Live: s.live},
		Isolation: &adminv1.Isolation{Accelerator: "tcg", Reason: "no /dev/kvm"}, SandboxesRunning: 1, SandboxesFailed: 1,
		Recovery: &adminv1.Recovery{Adopted: 1}, ContainerdVersion: "1.7",
	}, nil
}

func (s *standIn) CreateKey(_ context.Context, req *adminv1.CreateKeyRequest) (*adminv1.CreateKeyResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	info := &adminv1.Key{Id: "0123abcd", Namespace: req.GetNamespace(), CreatedAt: timestamppb.Now()}
	switch req.GetExpire() {
	case "":
	case "1w":
		info.ExpiresAt = timestamppb.New(time.Now().Add(7 * 24 * time.Hour))
	default:
		return nil, grpcstatus.Errorf(codes.InvalidArgument, "expiry %q: unknown unit", req.GetExpire())
	}
	s.live++
	return &adminv1.CreateKeyResponse{Key: "msb_v2.public.stand.in", Info: info}, nil
}

func (s *standIn) Reset(context.Context, *adminv1.ResetRequest) (*adminv1.ResetResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.live
	s.live = 0
	s.signing++
	return &adminv1.ResetResponse{SigningKeyId: fmt.Sprintf("key-%d", s.signing), Invalidated: n}, nil
}

func (s *standIn) Shutdown(_ context.Context, req *adminv1.ShutdownRequest) (*adminv1.ShutdownResponse, error) {
	s.shutdown()
	if req.GetStopSandboxes() {
		return &adminv1.ShutdownResponse{SandboxesStopped: 2}, nil
	}
	return &adminv1.ShutdownResponse{SandboxesLeftRunning: 1}, nil
}

func (s *standIn) ListSandboxes(_ context.Context, req *adminv1.ListSandboxesRequest) (*adminv1.ListSandboxesResponse, error) {
	resp := new(adminv1.ListSandboxesResponse)
	for _, b := range s.sandboxes {
		if ns := req.GetNamespace(); ns == "" || ns == b.GetNamespace() {
			resp.Sandboxes = append(resp.Sandboxes, b)
		}
	}
	return resp, nil
}

func (s *standIn) ImportImage(_ context.Context, req *adminv1.ImportImageRequest) (*adminv1.ImportImageResponse, error) {
	if _, err := os.Stat(req.GetPath()); err != nil {
		return nil, grpcstatus.Error(codes.NotFound, err.Error())
	}
	return &adminv1.ImportImageResponse{Images: []*adminv1.Image{{Name: "microsandbox/python"}}}, nil
}

func (s *standIn) ListImages(context.Context, *adminv1.ListImagesRequest) (*adminv1.ListImagesResponse, error) {
	return &adminv1.ListImagesResponse{Images: []*adminv1.Image{{
		Name: "microsandbox/python", Digest: "sha256:00", SizeBytes: 3 << 20, CreatedAt: timestamppb.Now(),
	}}}, nil
}
