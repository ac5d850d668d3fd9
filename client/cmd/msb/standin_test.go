package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/msbd/msbd/api/audit"
	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

// standIn answers as msbd would, without sandboxes behind it. Some ports make it a server in trouble.
type standIn struct {
	adminv1.UnimplementedAdminServiceServer
	port     string
	dev      bool
	shutdown func()
	began    time.Time
	log      string // the audit log's path

	mu        sync.Mutex
	keys      []*adminv1.Key
	signing   int
	head      audit.Head
	sandboxes []*adminv1.Sandbox
}

const (
	portInUse    = "1"
	portDegraded = "2"
	portDenied   = "3" // to the caller
	portOld      = "4" // a server of the time before key management
	portKVM      = "5" // began on KVM
)

// serveStandIn serves until it is told to end.
func serveStandIn(runDir, stateDir, port string, dev, resetKey bool) error {
	if port == portInUse {
		return errors.New("listen tcp 127.0.0.1:1: bind: address already in use")
	}
	if err := errors.Join(os.MkdirAll(runDir, 0o750), os.MkdirAll(stateDir, 0o700)); err != nil {
		return err
	}
	l, err := net.Listen("unix", filepath.Join(runDir, "msbd.sock"))
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	s := &standIn{
		port: port, dev: dev, shutdown: stop, began: time.Now(), log: filepath.Join(stateDir, "audit.jsonl"),
		sandboxes: []*adminv1.Sandbox{
			{Namespace: "default", Name: "my-env", Id: "a1", State: "running", Image: "microsandbox/python", Cpus: 1, MemoryMib: 512, CreatedAt: timestamppb.Now()},
			{Namespace: "team", Name: "broken", Id: "b2", State: "failed", Reason: "its microVM ended \x1b[2Jhere", Image: "microsandbox/node", Cpus: 2, MemoryMib: 1024, CreatedAt: timestamppb.Now()},
		},
	}
	if resetKey {
		s.signing = 100
	}
	if err := s.record(audit.ServerStart, "", nil); err != nil {
		return err
	}
	g := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		if port == portDenied {
			return nil, grpcstatus.Error(codes.PermissionDenied, "only root and members of group msb may administer it")
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		return handler(ctx, req)
	}))
	var service adminv1.AdminServiceServer = s
	if port == portOld {
		service = oldStandIn{standIn: s}
	}
	adminv1.RegisterAdminServiceServer(g, service)
	ended := context.AfterFunc(ctx, g.GracefulStop)
	defer ended()
	return g.Serve(l)
}

// examineAsStandIn prints what a doctor would, of a host with a lack that a terminal should not be commanded by;
// of one with a problem on a port in use.
func examineAsStandIn(runDir, stateDir, port string) {
	const head = `{"status":"%s","isolation":%s,"checks":[{"name":"settings","status":"ok","detail":"run %s, state %s"},` +
		`{"name":"KVM","status":"warning","detail":"no \u001b[2J/dev/kvm","remedy":"modprobe kvm_amd"}%s]}`
	const isolation = `{"hypervisor":"builtin","hypervisor_reason":"Kata's own driver needs KVM","accelerator":"tcg","reason":"no /dev/kvm","advice":["modprobe kvm_amd"]}`
	switch port {
	case portInUse:
		fmt.Printf(head, "problem", "null", runDir, stateDir, `,{"name":"address","status":"problem","detail":"in use","remedy":"--port"}`)
		os.Exit(1)
	case portOld:
		fmt.Fprintln(os.Stderr, "flag provided but not defined: -doctor")
		os.Exit(2)
	}
	fmt.Printf(head, "warning", isolation, runDir, stateDir, "")
	os.Exit(0)
}

// record adds to the audit log, always at the same time of day.
func (s *standIn) record(action, target string, detail map[string]string) error {
	line, head, err := s.head.Append(someDay, audit.Event{Action: action, Actor: audit.ActorUID(0), Target: target, Detail: detail})
	if err != nil {
		return err
	}
	s.head = head
	f, err := os.OpenFile(s.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(line)
	return errors.Join(err, f.Close())
}

// The times of keys, so that what is printed of them does not change from day to day.
var (
	someDay = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	farDay  = time.Date(2126, 1, 2, 3, 4, 5, 0, time.UTC)
)

func (s *standIn) GetStatus(context.Context, *adminv1.GetStatusRequest) (*adminv1.GetStatusResponse, error) {
	st := &adminv1.GetStatusResponse{
		State: adminv1.GetStatusResponse_DAEMON_STATE_READY, Version: "1.2.3", Pid: int32(os.Getpid()), StartedAt: timestamppb.New(s.began),
		ListenAddress: "127.0.0.1:" + s.port, AuthRequired: !s.dev, DevMode: s.dev, InstanceId: "instance",
		SigningKeyId: fmt.Sprintf("key-%d", s.signing), SigningKeyCreatedAt: timestamppb.New(s.began), Keys: new(adminv1.KeyCounts),
		Isolation: &adminv1.Isolation{
			Hypervisor: "builtin", HypervisorReason: "Kata's own driver needs KVM", Accelerator: "tcg", Reason: "no /dev/kvm", Advice: []string{"modprobe kvm_amd"},
		}, SandboxesRunning: 1, SandboxesFailed: 1,
		Recovery: &adminv1.Recovery{Adopted: 1}, ContainerdVersion: "1.7", AuditEntries: s.head.Seq,
	}
	for _, k := range s.keys {
		if isLive(k) {
			st.Keys.Live++
		} else {
			st.Keys.Revoked++
		}
	}
	if s.port == portKVM {
		st.Isolation = &adminv1.Isolation{Hypervisor: "kata", Accelerator: "kvm"}
	}
	if s.port == portOld {
		st.Isolation = &adminv1.Isolation{Accelerator: "tcg"}
	}
	if s.port == portDegraded {
		st.State, st.DegradedReasons = adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED, []string{"the disk is full"}
		st.Warnings = []string{"the certificate expires soon"}
		st.Tls = &adminv1.TLS{Source: "files", Names: []string{"a.example", "b.example"}, NotAfter: timestamppb.New(farDay), ClientCertificates: true}
	}
	return st, nil
}

func (s *standIn) add(k *adminv1.Key) *adminv1.Key {
	k.Id = fmt.Sprintf("0123%04x%024x", len(s.keys)+1, 0xabcd)
	k.State, k.CreatedAt, k.SigningKeyId = adminv1.KeyState_KEY_STATE_LIVE, timestamppb.New(someDay), fmt.Sprintf("key-%d", s.signing)
	if k.GetName() != "" { // has a user
		k.Requests, k.LastUsedAt, k.LastUsedFrom = 7, timestamppb.New(someDay.Add(time.Hour)), "192.0.2.7"
	}
	s.keys = append(s.keys, k)
	return k
}

func (s *standIn) secret() string { return fmt.Sprintf("msb_v2.public.stand.in%d", len(s.keys)) }

func (s *standIn) CreateKey(_ context.Context, req *adminv1.CreateKeyRequest) (*adminv1.CreateKeyResponse, error) {
	info := &adminv1.Key{Name: req.GetName(), Namespaces: req.GetNamespaces(), Scopes: req.GetScopes()}
	if expire := req.GetExpire(); expire != "" {
		if !regexp.MustCompile(`^(\d+(s|m|h|d|w|mo|y))+$`).MatchString(expire) {
			return nil, grpcstatus.Errorf(codes.InvalidArgument, "expiry %q: unknown unit", expire)
		}
		info.ExpiresAt = timestamppb.New(farDay)
	}
	if slices.ContainsFunc(s.keys, func(k *adminv1.Key) bool { return isLive(k) && k.GetName() != "" && k.GetName() == req.GetName() }) {
		return nil, grpcstatus.Errorf(codes.AlreadyExists, "name %q is another key's", req.GetName())
	}
	s.add(info)
	if err := s.record(audit.KeyCreate, info.GetId(), map[string]string{"name": info.GetName()}); err != nil {
		return nil, err
	}
	return &adminv1.CreateKeyResponse{Key: s.secret(), Info: info}, nil
}

// ListKeys has small pages, so that there are several.
func (s *standIn) ListKeys(_ context.Context, req *adminv1.ListKeysRequest) (*adminv1.ListKeysResponse, error) {
	const page = 2
	if req.GetUnusedFor() == "soon" {
		return nil, grpcstatus.Error(codes.InvalidArgument, `duration "soon": has no number`)
	}
	resp := new(adminv1.ListKeysResponse)
	for _, k := range s.keys {
		switch {
		case k.GetId() <= req.GetPageToken(),
			req.GetState() != 0 && req.GetState() != k.GetState(),
			req.GetNamespace() != "" && len(k.GetNamespaces()) > 0 && !slices.Contains(k.GetNamespaces(), req.GetNamespace()),
			req.GetUnusedFor() != "" && k.GetRequests() > 0:
		case len(resp.Keys) == page:
			resp.NextPageToken = resp.Keys[page-1].GetId()
			return resp, nil
		default:
			resp.Keys = append(resp.Keys, k)
		}
	}
	return resp, nil
}

func (s *standIn) find(ref string) (found *adminv1.Key, err error) {
	for _, k := range s.keys {
		if k.GetName() != ref && (len(ref) < 4 || !strings.HasPrefix(k.GetId(), ref)) {
			continue
		}
		if found != nil {
			return nil, grpcstatus.Errorf(codes.InvalidArgument, "%q is ambiguous: %s, %s", ref, found.GetId(), k.GetId())
		}
		found = k
	}
	if found == nil {
		return nil, grpcstatus.Errorf(codes.NotFound, "there is no API key %q", ref)
	}
	return found, nil
}

func (s *standIn) GetKey(_ context.Context, req *adminv1.GetKeyRequest) (*adminv1.GetKeyResponse, error) {
	k, err := s.find(req.GetRef())
	return &adminv1.GetKeyResponse{Key: k}, err
}

func (s *standIn) RevokeKey(_ context.Context, req *adminv1.RevokeKeyRequest) (*adminv1.RevokeKeyResponse, error) {
	k, err := s.find(req.GetRef())
	if err != nil {
		return nil, err
	}
	if isLive(k) {
		k.State, k.RevokedAt, k.Revocation = adminv1.KeyState_KEY_STATE_REVOKED, timestamppb.New(someDay), "revoked"
	}
	return &adminv1.RevokeKeyResponse{Key: k}, nil
}

func (s *standIn) RotateKey(_ context.Context, req *adminv1.RotateKeyRequest) (*adminv1.RotateKeyResponse, error) {
	old, err := s.find(req.GetRef())
	if err != nil {
		return nil, err
	}
	made := s.add(&adminv1.Key{Name: old.GetName(), Namespaces: old.GetNamespaces(), Scopes: old.GetScopes(), ExpiresAt: old.GetExpiresAt()})
	old.ReplacedBy, old.Revocation, old.RevokedAt = made.GetId(), "rotated", timestamppb.New(farDay)
	if req.GetGrace() == "" {
		old.State, old.RevokedAt = adminv1.KeyState_KEY_STATE_REVOKED, timestamppb.New(someDay)
	}
	return &adminv1.RotateKeyResponse{Key: s.secret(), Info: made, Old: old}, nil
}

func (s *standIn) PruneKeys(_ context.Context, req *adminv1.PruneKeysRequest) (*adminv1.PruneKeysResponse, error) {
	resp := new(adminv1.PruneKeysResponse)
	for _, k := range s.keys {
		if !isLive(k) {
			resp.Keys = append(resp.Keys, k)
		}
	}
	if !req.GetDryRun() {
		s.keys = slices.DeleteFunc(s.keys, func(k *adminv1.Key) bool { return !isLive(k) })
	}
	return resp, nil
}

func (s *standIn) Reset(context.Context, *adminv1.ResetRequest) (*adminv1.ResetResponse, error) {
	n := int32(0)
	for _, k := range s.keys {
		if isLive(k) {
			n++
			k.State, k.RevokedAt, k.Revocation = adminv1.KeyState_KEY_STATE_REVOKED, timestamppb.New(someDay), "reset"
		}
	}
	s.signing++
	return &adminv1.ResetResponse{SigningKeyId: fmt.Sprintf("key-%d", s.signing), Invalidated: n}, nil
}

const archive = "the whole archive, of several chunks"

func (s *standIn) Backup(_ *adminv1.BackupRequest, stream adminv1.AdminService_BackupServer) error {
	half := len(archive) / 2
	if err := stream.Send(&adminv1.BackupResponse{Chunk: []byte(archive[:half])}); err != nil {
		return err
	}
	if s.port == portDegraded {
		return grpcstatus.Error(codes.FailedPrecondition, "msbd is degraded")
	}
	return stream.Send(&adminv1.BackupResponse{Chunk: []byte(archive[half:])})
}

func (s *standIn) Restore(stream adminv1.AdminService_RestoreServer) error {
	var got bytes.Buffer
	for {
		req, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		got.Write(req.GetChunk())
	}
	if got.String() != archive {
		return grpcstatus.Error(codes.DataLoss, "the archive is damaged; nothing was changed")
	}
	return stream.SendAndClose(&adminv1.RestoreResponse{SigningKeyId: "key-9", Live: 3, Invalidated: 2, TakenAt: timestamppb.New(someDay)})
}

func (s *standIn) TailAudit(req *adminv1.TailAuditRequest, stream adminv1.AdminService_TailAuditServer) error {
	sent := 0
	for {
		s.mu.Lock()
		content, err := os.ReadFile(s.log)
		s.mu.Unlock()
		if err != nil {
			return err
		}
		lines := strings.Split(strings.TrimSuffix(string(content), "\n"), "\n")
		if sent == 0 {
			sent = max(0, len(lines)-int(req.GetLast()))
		}
		for ; sent < len(lines); sent++ {
			if err := stream.Send(&adminv1.TailAuditResponse{Line: lines[sent]}); err != nil {
				return err
			}
		}
		if !req.GetFollow() {
			return nil
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (s *standIn) VerifyAudit(context.Context, *adminv1.VerifyAuditRequest) (*adminv1.VerifyAuditResponse, error) {
	resp := &adminv1.VerifyAuditResponse{Entries: s.head.Seq, Hash: s.head.Hash, Path: s.log}
	f, err := os.Open(s.log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if head, err := audit.Verify(f); err != nil {
		resp.Entries, resp.Hash, resp.Problem = head.Seq, head.Hash, err.Error()
	}
	return resp, nil
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

// oldStandIn knows no names and scopes of keys, takes the last of several namespaces, and has no other
// call of keys than CreateKey.
type oldStandIn struct {
	adminv1.UnimplementedAdminServiceServer
	standIn *standIn
}

func (s oldStandIn) GetStatus(ctx context.Context, req *adminv1.GetStatusRequest) (*adminv1.GetStatusResponse, error) {
	return s.standIn.GetStatus(ctx, req)
}

func (s oldStandIn) CreateKey(ctx context.Context, req *adminv1.CreateKeyRequest) (*adminv1.CreateKeyResponse, error) {
	old := &adminv1.CreateKeyRequest{Expire: req.GetExpire()}
	if ns := req.GetNamespaces(); len(ns) > 0 {
		old.Namespaces = ns[len(ns)-1:]
	}
	return s.standIn.CreateKey(ctx, old)
}

func (s oldStandIn) Shutdown(ctx context.Context, req *adminv1.ShutdownRequest) (*adminv1.ShutdownResponse, error) {
	return s.standIn.Shutdown(ctx, req)
}
