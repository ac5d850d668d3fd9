package admin

import (
	"context"
	"log/slog"
	"net"
	"os/user"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/sandbox"
	"github.com/msbd/msbd/daemon/internal/token"
)

// keyRecords is a token.Store in memory.
type keyRecords struct{ records []token.Record }

func (k *keyRecords) AddKey(r token.Record) error                         { k.records = append(k.records, r); return nil }
func (k *keyRecords) Keys() ([]token.Record, error)                       { return k.records, nil }
func (k *keyRecords) RevokeKeysNotSignedBy(id string, at time.Time) error { return nil }

type sandboxes struct {
	records []sandbox.Record
	stopped []sandbox.Name
}

func (s *sandboxes) List(namespace string) (out []sandbox.Record) {
	for _, r := range s.records {
		if namespace == "" || r.Name.Namespace == namespace {
			out = append(out, r)
		}
	}
	return out
}

func (s *sandboxes) StopAll(context.Context) (int, error) {
	n := len(s.records)
	s.records = nil
	return n, nil
}

func (s *sandboxes) Stop(_ context.Context, name sandbox.Name) error {
	s.stopped = append(s.stopped, name)
	return nil
}

type images []Image

func (i images) Import(context.Context, string) ([]Image, error) { return i, nil }
func (i images) List(context.Context) ([]Image, error)           { return i, nil }

type fixture struct {
	client    adminv1.AdminServiceClient
	conn      *grpc.ClientConn
	shutdowns int
	state     adminv1.GetStatusResponse_DaemonState
	peer      Peer
	peerKnown bool
	verifier  *token.Verifier
	store     *keyRecords
	sandboxes *sandboxes
	log       strings.Builder
}

// newFixture serves an AdminService over real token rooms; the caller is root until told otherwise.
func newFixture(t *testing.T, group string) *fixture {
	t.Helper()
	f := &fixture{
		state:     adminv1.GetStatusResponse_DAEMON_STATE_READY,
		peerKnown: true,
		store:     new(keyRecords),
		sandboxes: new(sandboxes),
	}
	log := slog.New(slog.NewTextHandler(&f.log, nil))
	issuer, verifier, err := token.Open(token.Options{
		KeyringPath: t.TempDir() + "/keys/keyring.json", Store: f.store, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	f.verifier = verifier
	ctx, stop := context.WithCancel(context.Background())
	server := New(Options{
		Keys:      issuer,
		Sandboxes: f.sandboxes,
		Images: images{{
			Name: "microsandbox/python", Digest: "sha256:00", Size: 7, Created: time.Unix(1, 0),
		}},
		Status: func() *adminv1.GetStatusResponse {
			return &adminv1.GetStatusResponse{State: f.state, DegradedReasons: []string{"no disk"}}
		},
		Shutdown:    func() { f.shutdowns++ },
		Credentials: insecure.NewCredentials(),
		PeerOf:      func(context.Context) (Peer, bool) { return f.peer, f.peerKnown },
		Group:       group,
		Log:         log,
	})
	l := bufconn.Listen(1 << 16)
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, l) }()
	f.conn, err = grpc.NewClient("passthrough:bufconn",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.conn.Close()
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	f.client = adminv1.NewAdminServiceClient(f.conn)
	return f
}

// call makes a call of a method by name, with an empty request.
func (f *fixture) call(t *testing.T, method string) codes.Code {
	t.Helper()
	// Every request and response of the service is known by its descriptor; an empty message is valid
	// on the wire for all of them.
	return status.Code(f.conn.Invoke(t.Context(), method, &adminv1.ResetRequest{}, &adminv1.ResetRequest{}))
}

func TestEveryMethodIsInTheTable(t *testing.T) {
	for _, m := range adminv1.AdminService_ServiceDesc.Methods {
		if methods["/"+adminv1.AdminService_ServiceDesc.ServiceName+"/"+m.MethodName] == denied {
			t.Errorf("%s is served but has no access of its own", m.MethodName)
		}
	}
	if n := len(adminv1.AdminService_ServiceDesc.Methods); n != len(methods) {
		t.Errorf("the table has %d methods, the service %d", len(methods), n)
	}
}

func TestUnlistedMethodIsDenied(t *testing.T) {
	f := newFixture(t, "")
	const method = adminv1.AdminService_ListImages_FullMethodName
	need := methods[method]
	delete(methods, method)
	defer func() { methods[method] = need }()
	if code := f.call(t, method); code != codes.PermissionDenied {
		t.Errorf("got %s", code)
	}
}

func TestPeersAreAuthorised(t *testing.T) {
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Skip("this host has no user nobody")
	}
	id := func(s string) uint32 {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		return uint32(n)
	}
	group, err := user.LookupGroupId(nobody.Gid)
	if err != nil {
		t.Fatal(err)
	}
	uid, gid := id(nobody.Uid), id(nobody.Gid)
	tests := map[string]struct {
		group   string
		peer    Peer
		unknown bool
		want    codes.Code
	}{
		"root":                   {"no-such-group", Peer{0, 0}, false, codes.OK},
		"a stranger":             {"no-such-group", Peer{uid, gid}, false, codes.PermissionDenied},
		"effective group":        {group.Name, Peer{4e9, gid}, false, codes.OK},
		"member by the database": {group.Name, Peer{uid, 4e9}, false, codes.OK},
		"neither":                {group.Name, Peer{4e9, 4e9}, false, codes.PermissionDenied},
		"peer not known":         {group.Name, Peer{}, true, codes.PermissionDenied},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, tt.group)
			f.peer, f.peerKnown = tt.peer, !tt.unknown
			for method := range methods {
				got := f.call(t, method)
				if tt.want == codes.OK {
					if got == codes.PermissionDenied {
						t.Errorf("%s: denied", method)
					}
				} else if got != tt.want {
					t.Errorf("%s: %s, want %s", method, got, tt.want)
				}
			}
			if tt.want != codes.OK && len(f.store.records) != 0 {
				t.Error("a key was made all the same")
			}
		})
	}
}

func TestStatesGateMethods(t *testing.T) {
	type want map[access]codes.Code
	tests := map[string]struct {
		state adminv1.GetStatusResponse_DaemonState
		want  want
	}{
		"starting":   {adminv1.GetStatusResponse_DAEMON_STATE_STARTING, want{read: codes.Unavailable, mutate: codes.Unavailable}},
		"recovering": {adminv1.GetStatusResponse_DAEMON_STATE_RECOVERING, want{read: codes.Unavailable, mutate: codes.Unavailable}},
		"degraded":   {adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED, want{mutate: codes.FailedPrecondition}},
		"draining":   {adminv1.GetStatusResponse_DAEMON_STATE_DRAINING, want{mutate: codes.Unavailable}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, "")
			f.state = tt.state
			for method, need := range methods {
				if got := f.call(t, method); got != tt.want[need] {
					t.Errorf("%s: %s, want %s", method, got, tt.want[need])
				}
			}
		})
	}
}

func TestCreateKey(t *testing.T) {
	f := newFixture(t, "")
	resp, err := f.client.CreateKey(t.Context(), &adminv1.CreateKeyRequest{Expire: "1w", Namespace: "project-web"})
	if err != nil {
		t.Fatal(err)
	}
	p, err := f.verifier.Verify(resp.GetKey())
	if err != nil {
		t.Fatal(err)
	}
	info := resp.GetInfo()
	if p.KeyID != info.GetId() || p.Namespace != "project-web" || info.GetNamespace() != "project-web" {
		t.Errorf("the key speaks for %+v, its info says %v", p, info)
	}
	if life := info.GetExpiresAt().AsTime().Sub(info.GetCreatedAt().AsTime()); life != 7*24*time.Hour {
		t.Errorf("the key lives %s", life)
	}
	if strings.Contains(f.log.String(), resp.GetKey()) || !strings.Contains(f.log.String(), info.GetId()) {
		t.Errorf("the log should have the key's id and not the key:\n%s", f.log.String())
	}

	resp, err = f.client.CreateKey(t.Context(), &adminv1.CreateKeyRequest{})
	if err != nil || resp.GetInfo().GetExpiresAt() != nil || resp.GetInfo().GetNamespace() != "" {
		t.Errorf("a key without limits is %v, %v", resp.GetInfo(), err)
	}
	for _, bad := range []*adminv1.CreateKeyRequest{{Expire: "7"}, {Expire: "1fortnight"}, {Namespace: "../x"}} {
		if _, err := f.client.CreateKey(t.Context(), bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("CreateKey(%v): %v", bad, err)
		}
	}
}

func TestReset(t *testing.T) {
	f := newFixture(t, "")
	key, err := f.client.CreateKey(t.Context(), &adminv1.CreateKeyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := f.client.Reset(t.Context(), &adminv1.ResetRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if resp.GetInvalidated() != 1 || resp.GetSigningKeyId() == "" {
		t.Errorf("got %v", resp)
	}
	if _, err := f.verifier.Verify(key.GetKey()); err == nil {
		t.Error("a key from before the reset is taken")
	}
}

func TestSandboxesAndImages(t *testing.T) {
	f := newFixture(t, "")
	at := time.Unix(9, 0)
	f.sandboxes.records = []sandbox.Record{
		{
			ID: "a1", Name: sandbox.Name{Namespace: "default", Name: "my-env"}, State: sandbox.Failed, Reason: "lost", CreatedAt: at,
			Config: sandbox.Config{Image: "microsandbox/python", CPUs: 1, MemoryMiB: 512},
		},
		{ID: "b2", Name: sandbox.Name{Namespace: "other", Name: "x"}, State: sandbox.Running},
	}
	got, err := f.client.ListSandboxes(t.Context(), &adminv1.ListSandboxesRequest{Namespace: "default"})
	if err != nil {
		t.Fatal(err)
	}
	want := &adminv1.ListSandboxesResponse{Sandboxes: []*adminv1.Sandbox{{
		Namespace: "default", Name: "my-env", Id: "a1", State: "failed", Reason: "lost",
		Image: "microsandbox/python", Cpus: 1, MemoryMib: 512, CreatedAt: timestamppb.New(at),
	}}}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if _, err := f.client.StopSandbox(t.Context(), &adminv1.StopSandboxRequest{Name: "my-env"}); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]sandbox.Name{{Namespace: "default", Name: "my-env"}}, f.sandboxes.stopped); diff != "" {
		t.Error(diff)
	}
	imported, err := f.client.ListImages(t.Context(), &adminv1.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	wantImages := &adminv1.ListImagesResponse{Images: []*adminv1.Image{{
		Name: "microsandbox/python", Digest: "sha256:00", SizeBytes: 7, CreatedAt: timestamppb.New(time.Unix(1, 0)),
	}}}
	if diff := cmp.Diff(wantImages, imported, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestShutdown(t *testing.T) {
	f := newFixture(t, "")
	records := []sandbox.Record{{ID: "a1", State: sandbox.Running}, {ID: "b2", State: sandbox.Failed}}
	f.sandboxes.records = records
	resp, err := f.client.Shutdown(t.Context(), &adminv1.ShutdownRequest{})
	if err != nil || resp.GetSandboxesStopped() != 0 || resp.GetSandboxesLeftRunning() != 1 || f.shutdowns != 1 {
		t.Errorf("leaving sandboxes: %v, %v, %d shutdowns", resp, err, f.shutdowns)
	}
	resp, err = f.client.Shutdown(t.Context(), &adminv1.ShutdownRequest{StopSandboxes: true})
	if err != nil || resp.GetSandboxesStopped() != 2 || resp.GetSandboxesLeftRunning() != 0 || f.shutdowns != 2 {
		t.Errorf("stopping sandboxes: %v, %v, %d shutdowns", resp, err, f.shutdowns)
	}
}

func TestServeSaysWhenItsListenerBreaks(t *testing.T) {
	l := bufconn.Listen(1)
	l.Close()
	s := New(Options{Credentials: insecure.NewCredentials()})
	if err := s.Serve(t.Context(), l); err == nil {
		t.Error("no error")
	}
}
