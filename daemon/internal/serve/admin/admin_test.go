package admin

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/msbd/msbd/api/audit"
	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/peer"
)

func TestEveryMethodIsInTheTable(t *testing.T) {
	for _, m := range serviceMethods() {
		if methods[m] == denied {
			t.Errorf("%s is a method of the service but is not in the table", m)
		}
	}
	if n := len(serviceMethods()); n != len(methods) {
		t.Errorf("the table has %d methods, the service has %d", len(methods), n)
	}
}

func TestUnlistedMethodIsDenied(t *testing.T) {
	f := newFixture(t, "")
	for _, method := range serviceMethods() {
		need := methods[method]
		delete(methods, method)
		code := f.call(t, method)
		methods[method] = need
		if code != codes.PermissionDenied {
			t.Errorf("%s: got %s, want PermissionDenied", method, code)
		}
	}
	if f.shutdowns != 0 || len(f.store.TakeEvents()) != 0 {
		t.Error("a denied call had an effect")
	}
}

func TestNothingElseIsServed(t *testing.T) {
	f := newFixture(t, "")
	for _, method := range []string{
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
		"/grpc.health.v1.Health/Check",
		"/grpc.channelz.v1.Channelz/GetServers",
		"/msb.admin.v1.AdminService/Unknown",
	} {
		if code := f.call(t, method); code != codes.Unimplemented {
			t.Errorf("%s: got %s, want Unimplemented", method, code)
		}
	}
}

func TestPeersAreAuthorized(t *testing.T) {
	group, err := user.LookupGroup("daemon")
	if err != nil {
		t.Fatal(err)
	}
	gid, err := strconv.ParseUint(group.Gid, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	const otherUID = 4e9
	groups := []uint32{otherUID, uint32(gid)}
	tests := map[string]struct {
		group   string
		peer    peer.Peer
		unknown bool
		want    codes.Code
	}{
		"root":                      {"no-such-group", peer.Peer{}, false, codes.OK},
		"the daemon's own user":     {"no-such-group", peer.Peer{UID: uint32(os.Geteuid())}, false, codes.OK},
		"group does not exist":      {"no-such-group", peer.Peer{UID: otherUID, Groups: groups}, false, codes.PermissionDenied},
		"member of the group":       {group.Name, peer.Peer{UID: otherUID, Groups: groups}, false, codes.OK},
		"member of another group":   {group.Name, peer.Peer{UID: otherUID, Groups: groups[:1]}, false, codes.PermissionDenied},
		"member of no group":        {group.Name, peer.Peer{UID: otherUID}, false, codes.PermissionDenied},
		"credentials are not known": {group.Name, peer.Peer{}, true, codes.PermissionDenied},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, tt.group)
			f.backups.restored = make(chan error, 2)
			f.peer, f.peerKnown = tt.peer, !tt.unknown
			for method := range methods {
				if got := f.call(t, method); (got == codes.PermissionDenied) != (tt.want == codes.PermissionDenied) {
					t.Errorf("%s: got %s, want %s", method, got, tt.want)
				}
			}
			if tt.want != codes.OK && (len(f.store.Records()) != 0 || f.shutdowns != 0 || len(f.store.TakeEvents()) != 0) {
				t.Error("a denied call had an effect")
			}
		})
	}
}

func TestStatesGateMethods(t *testing.T) {
	type want map[access]codes.Code
	const degraded = adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED
	tests := map[string]struct {
		state adminv1.GetStatusResponse_DaemonState
		want  want
	}{
		"starting": {
			adminv1.GetStatusResponse_DAEMON_STATE_STARTING,
			want{read: codes.Unavailable, urgent: codes.Unavailable, mutate: codes.Unavailable},
		},
		"recovering": {
			adminv1.GetStatusResponse_DAEMON_STATE_RECOVERING,
			want{read: codes.Unavailable, urgent: codes.Unavailable, mutate: codes.Unavailable},
		},
		"ready":    {adminv1.GetStatusResponse_DAEMON_STATE_READY, want{}},
		"degraded": {degraded, want{mutate: codes.FailedPrecondition}},
		"draining": {adminv1.GetStatusResponse_DAEMON_STATE_DRAINING, want{urgent: codes.Unavailable, mutate: codes.Unavailable}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, "")
			f.state = tt.state
			for method, need := range methods {
				got := f.call(t, method)
				if want := tt.want[need]; want != codes.OK {
					if got != want {
						t.Errorf("%s: got %s, want %s", method, got, want)
					}
				} else if got == codes.Unavailable || got == codes.FailedPrecondition {
					t.Errorf("%s was refused: %s", method, got)
				}
			}
		})
	}
}

// Computing the complete status counts every key, so only GetStatus may do it.
func TestOnlyGetStatusAsksForTheStatus(t *testing.T) {
	f := newFixture(t, "")
	for method := range methods {
		f.call(t, method)
	}
	if f.statuses != 1 {
		t.Errorf("%d calls computed the status %d times, want once", len(methods), f.statuses)
	}
}

// This repeats the table on purpose, so that no method is served in another state by mistake.
func TestWhatIsServedInTrouble(t *testing.T) {
	for state, want := range map[adminv1.GetStatusResponse_DaemonState][]string{
		adminv1.GetStatusResponse_DAEMON_STATE_STARTING: {"GetStatus", "Shutdown"},
		adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED: {
			"AcceptClock", "GetKey", "GetStatus", "ListImages", "ListKeys", "ListSandboxes", "PoolStatus", "Reset", "RevokeKey", "Shutdown", "StopSandbox", "TailAudit", "VerifyAudit",
		},
		adminv1.GetStatusResponse_DAEMON_STATE_DRAINING: {
			"GetKey", "GetStatus", "ListImages", "ListKeys", "ListSandboxes", "PoolStatus", "Shutdown", "TailAudit", "VerifyAudit",
		},
	} {
		f := newFixture(t, "")
		f.state = state
		var got []string
		for _, method := range serviceMethods() {
			if code := f.call(t, method); code != codes.Unavailable && code != codes.FailedPrecondition {
				got = append(got, method[strings.LastIndexByte(method, '/')+1:])
			}
		}
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("methods served in %s (-want +got):\n%s", state, diff)
		}
	}
}

func TestSandboxesAndImages(t *testing.T) {
	f := newFixture(t, "root") // a group that exists on every host
	f.peer = peer.Peer{UID: 1234, Groups: []uint32{0}}
	at := time.Unix(9, 0)
	f.sandboxes.records = []sandbox.Record{
		{
			ID: "a1", Name: sandbox.Name{Namespace: "default", Name: "my-env"}, State: sandbox.Failed, Reason: "lost", CreatedAt: at,
			Config: sandbox.Config{Template: sandbox.Template{Image: "microsandbox/python", CPUs: 1, MemoryMiB: 512, DiskMiB: 4096}},
		},
		{ID: "b2", Name: sandbox.Name{Namespace: "other", Name: "x"}, State: sandbox.Running},
	}
	got, err := f.client.ListSandboxes(t.Context(), &adminv1.ListSandboxesRequest{Namespace: "default"})
	if err != nil {
		t.Fatal(err)
	}
	want := &adminv1.ListSandboxesResponse{Sandboxes: []*adminv1.Sandbox{{
		Namespace: "default", Name: "my-env", Id: "a1", State: "failed", Reason: "lost",
		Image: "microsandbox/python", Cpus: 1, MemoryMib: 512, DiskMib: 4096, CreatedAt: timestamppb.New(at),
	}}}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	wantImages := []*adminv1.Image{{
		Name: "microsandbox/python", Digest: "sha256:00", SizeBytes: 7, CreatedAt: timestamppb.New(time.Unix(1, 0)),
	}}
	listed, err := f.client.ListImages(t.Context(), &adminv1.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(wantImages, listed.GetImages(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if events := f.store.TakeEvents(); len(events) != 0 {
		t.Errorf("read methods wrote to the audit log: %v", events)
	}

	if _, err := f.client.StopSandbox(t.Context(), &adminv1.StopSandboxRequest{Name: "my-env"}); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]sandbox.Name{{Namespace: "default", Name: "my-env"}}, f.sandboxes.stopped); diff != "" {
		t.Error(diff)
	}
	imported, err := f.importImage(t, "/x.tar")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]*adminv1.ImportImageResponse{{Images: wantImages}}, imported, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if _, err := f.client.RemoveImage(t.Context(), &adminv1.RemoveImageRequest{Name: "a/b"}); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"a/b"}, f.images.removed); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(f.sandboxes.records, f.images.seen); diff != "" { // of all namespaces
		t.Error(diff)
	}
	f.images.err = fmt.Errorf("image a/c is used by the sandbox other/x: %w", errdefs.ErrFailedPrecondition)
	if _, err := f.client.RemoveImage(t.Context(), &adminv1.RemoveImageRequest{Name: "a/c"}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("removing an image that is used: %v", err)
	}
	f.images.err = fmt.Errorf("/y.tar is not an image: %w", errdefs.ErrInvalidArgument)
	if _, err := f.importImage(t, "/y.tar"); err == nil {
		t.Error("a failed import returns no error")
	}
	wantEvents := []audit.Event{
		{Action: audit.SandboxStop, Actor: "uid:1234", Target: "default/my-env"},
		{Action: audit.ImageImport, Actor: "uid:1234", Target: "/x.tar"},
		{Action: audit.ImageRemove, Actor: "uid:1234", Target: "a/b"},
		{Action: audit.ImageRemove, Actor: "uid:1234", Target: "a/c"},
		{Action: audit.RemoveFailed, Actor: "uid:1234", Target: "a/c", Detail: map[string]string{"error": "image a/c is used by the sandbox other/x"}},
		{Action: audit.ImageImport, Actor: "uid:1234", Target: "/y.tar"},
		{Action: audit.ImportFailed, Actor: "uid:1234", Target: "/y.tar", Detail: map[string]string{"error": "/y.tar is not an image"}},
	}
	if diff := cmp.Diff(wantEvents, f.store.TakeEvents()); diff != "" {
		t.Error(diff)
	}
}

// importImage imports an archive and returns all messages of the server.
func (f *fixture) importImage(t *testing.T, path string) (messages []*adminv1.ImportImageResponse, err error) {
	t.Helper()
	stream, err := f.client.ImportImage(t.Context(), &adminv1.ImportImageRequest{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	for {
		message, err := stream.Recv()
		if err == io.EOF {
			return messages, nil
		}
		if err != nil {
			return messages, err
		}
		messages = append(messages, message)
	}
}

// An import reports its latest progress, but not too often. The client gets it before the import has ended.
func TestImportProgress(t *testing.T) {
	f := newFixture(t, "")
	received := make(chan struct{})
	var began time.Time
	f.images.onImport = func(progress func(sandbox.ImportProgress)) {
		began = time.Now()
		progress(sandbox.ImportProgress{Phase: sandbox.ImportReading, Done: 1, Total: 2})
		<-received
		for i := range int64(10_000) {
			progress(sandbox.ImportProgress{Phase: sandbox.ImportUnpacking, Image: "a/b", Done: i, Total: 10_000})
		}
		<-received
	}
	stream, err := f.client.ImportImage(t.Context(), &adminv1.ImportImageRequest{Path: "/x.tar"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []*adminv1.ImportProgress{
		{Phase: "reading", Done: 1, Total: 2}, {Phase: "unpacking", Image: "a/b", Done: 9999, Total: 10_000},
	} {
		got, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(&adminv1.ImportImageResponse{Progress: want}, got, protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
		received <- struct{}{}
	}
	if passed := time.Since(began); passed < progressInterval {
		t.Errorf("two messages within %v", passed)
	}
	if got, err := stream.Recv(); err != nil || len(got.GetImages()) != 1 || got.GetProgress() != nil {
		t.Errorf("last message %v, %v", got, err)
	}
	if got, err := stream.Recv(); err != io.EOF {
		t.Errorf("after the last message: %v, %v", got, err)
	}
}

func TestShutdown(t *testing.T) {
	f := newFixture(t, "")
	f.sandboxes.records = []sandbox.Record{{ID: "a1", State: sandbox.Running}, {ID: "b2", State: sandbox.Failed}}
	resp, err := f.client.Shutdown(t.Context(), &adminv1.ShutdownRequest{})
	if err != nil || resp.GetSandboxesStopped() != 0 || resp.GetSandboxesLeftRunning() != 1 || f.shutdowns != 1 {
		t.Errorf("leaving sandboxes running: %v, %v, %d shutdowns", resp, err, f.shutdowns)
	}
	resp, err = f.client.Shutdown(t.Context(), &adminv1.ShutdownRequest{StopSandboxes: true})
	if err != nil || resp.GetSandboxesStopped() != 2 || resp.GetSandboxesLeftRunning() != 0 || f.shutdowns != 2 {
		t.Errorf("stopping sandboxes: %v, %v, %d shutdowns", resp, err, f.shutdowns)
	}
	want := []audit.Event{
		{Action: audit.ServerStop, Actor: "uid:0"},
		{Action: audit.ServerStop, Actor: "uid:0", Detail: map[string]string{"sandboxes": "stopped"}},
	}
	if diff := cmp.Diff(want, f.store.TakeEvents()); diff != "" {
		t.Error(diff)
	}
}

// An operation that cannot be recorded in the audit log is not performed, except stopping sandboxes.
func TestNothingHappensWithoutItsAuditLine(t *testing.T) {
	f := newFixture(t, "")
	f.sandboxes.records = []sandbox.Record{{ID: "a1", State: sandbox.Running}}
	f.store.FailWith(errors.New("no space left on device"))
	for name, act := range map[string]func() error{
		"import": func() error {
			_, err := f.importImage(t, "/x.tar")
			return err
		},
		"remove": func() error {
			_, err := f.client.RemoveImage(t.Context(), &adminv1.RemoveImageRequest{Name: "a/b"})
			return err
		},
		"stop the server": func() error {
			_, err := f.client.Shutdown(t.Context(), &adminv1.ShutdownRequest{})
			return err
		},
		"create a key": func() error {
			_, err := f.client.CreateKey(t.Context(), &adminv1.CreateKeyRequest{})
			return err
		},
	} {
		if err := act(); err == nil || !strings.Contains(err.Error(), "no space left") {
			t.Errorf("%s: got error %v, want \"no space left\"", name, err)
		}
	}
	if len(f.sandboxes.records) != 1 || len(f.images.imported)+len(f.images.removed) != 0 || f.shutdowns != 0 || len(f.store.Records()) != 0 {
		t.Errorf("an operation was performed: %+v, %+v, %d shutdowns", f.sandboxes, f.images, f.shutdowns)
	}
}

// An administrator can stop sandboxes even if the disk is full. The entry in the audit log is written when a stop has freed
// the disk. If that fails as well, the caller gets an error.
func TestSandboxesCanBeStoppedWithoutAnAuditLine(t *testing.T) {
	for name, call := range map[string]func(f *fixture) error{
		"stop a sandbox": func(f *fixture) error {
			_, err := f.client.StopSandbox(t.Context(), &adminv1.StopSandboxRequest{Name: "my-env"})
			return err
		},
		"stop the server": func(f *fixture) error {
			_, err := f.client.Shutdown(t.Context(), &adminv1.ShutdownRequest{StopSandboxes: true})
			return err
		},
	} {
		for _, freed := range []bool{true, false} {
			f := newFixture(t, "")
			f.sandboxes.records = []sandbox.Record{{ID: "a1", State: sandbox.Running}}
			f.store.FailWith(errors.New("no space left on device"))
			f.sandboxes.onStop = func() {
				if freed {
					f.store.FailWith(nil)
				}
			}
			err := call(f)
			if len(f.sandboxes.stopped) == 0 && len(f.sandboxes.records) != 0 {
				t.Errorf("%s: nothing was stopped", name)
			}
			if !freed && (err == nil || !strings.Contains(err.Error(), "not in the audit log") || f.shutdowns != 0) {
				t.Errorf("%s: got error %v and %d shutdowns, want an error about the audit log", name, err, f.shutdowns)
			}
			if events := f.store.TakeEvents(); freed && (err != nil || len(events) != 1) {
				t.Errorf("%s: got error %v and the entries %v, want one entry", name, err, events)
			}
		}
	}
}

func TestServeReturnsListenerErrors(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	s := New(Options{Credentials: insecure.NewCredentials()})
	if err := s.Serve(t.Context(), l); err == nil {
		t.Error("Serve on a closed listener returned no error")
	}
}

// A refused call has the code and the message of the domain error, which says what to do.
func TestRefusalsSayWhatToDo(t *testing.T) {
	f := newFixture(t, "msb")
	f.peer = peer.Peer{UID: 4e9}
	_, err := f.client.GetStatus(t.Context(), &adminv1.GetStatusRequest{})
	if s := status.Convert(err); s.Code() != codes.PermissionDenied || !strings.Contains(s.Message(), "usermod -aG msb") {
		t.Error(err)
	}
	f.peer = peer.Peer{}
	f.state = adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED
	_, err = f.client.CreateKey(t.Context(), &adminv1.CreateKeyRequest{})
	if s := status.Convert(err); s.Code() != codes.FailedPrecondition || !strings.Contains(s.Message(), "no disk") {
		t.Error(err)
	}
	f.state = adminv1.GetStatusResponse_DAEMON_STATE_READY
	f.store.FailWith(errors.New("no space"))
	_, err = f.client.Shutdown(t.Context(), &adminv1.ShutdownRequest{})
	if want := fmt.Sprintf("SIGTERM to process %d", os.Getpid()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got error %v, want it to contain %q", err, want)
	}
}
