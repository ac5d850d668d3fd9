package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/msbd/msbd/api/audit"
	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/sys/peer"
)

func (f *fixture) backup(t *testing.T) (string, error) {
	t.Helper()
	stream, err := f.client.Backup(t.Context(), &adminv1.BackupRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for {
		resp, err := stream.Recv()
		if err == io.EOF {
			return got.String(), nil
		}
		if err != nil {
			return got.String(), err
		}
		got.Write(resp.GetChunk())
	}
}

// Larger than a message may be, and no multiple of a chunk.
var large = strings.Repeat("an archive ", 500_000)

func TestBackup(t *testing.T) {
	f := newFixture(t, "root")
	f.peer = peer.Peer{UID: 1234, Groups: []uint32{0}}
	f.archives.content = large
	if got, err := f.backup(t); err != nil || got != large || f.archives.by != 1234 {
		t.Errorf("got %d of %d bytes, %v, by %d", len(got), len(large), err, f.archives.by)
	}
	f.archives.err = fmt.Errorf("the disk is gone: %w", errdefs.ErrFailedPrecondition)
	if _, err := f.backup(t); status.Code(err) != codes.FailedPrecondition || status.Convert(err).Message() != "the disk is gone" {
		t.Errorf("a backup that fails at its end: %v", err)
	}
}

func TestRestore(t *testing.T) {
	f := newFixture(t, "")
	restore := func() (*adminv1.RestoreResponse, error) {
		t.Helper()
		stream, err := f.client.Restore(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for rest := large; rest != ""; {
			chunk := rest[:min(len(rest), 100_000)]
			rest = rest[len(chunk):]
			if err := stream.Send(&adminv1.RestoreRequest{Chunk: []byte(chunk)}); err != nil {
				t.Fatal(err)
			}
			if err := stream.Send(&adminv1.RestoreRequest{}); err != nil { // an empty one is no end
				t.Fatal(err)
			}
		}
		resp, err := stream.CloseAndRecv()
		<-f.archives.restored
		return resp, err
	}
	resp, err := restore()
	if err != nil {
		t.Fatal(err)
	}
	if f.archives.read != large {
		t.Errorf("got %d of %d bytes", len(f.archives.read), len(large))
	}
	want := &adminv1.RestoreResponse{
		SigningKeyId: f.server.Keys.SigningKey().ID, Live: 2, Invalidated: 1, TakenAt: timestamppb.New(time.Unix(9, 0)),
	}
	if diff := cmp.Diff(want, resp, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	f.archives.err = fmt.Errorf("the archive is damaged: %w", errdefs.ErrDataLoss)
	if _, err := restore(); status.Code(err) != codes.DataLoss {
		t.Error(err)
	}
}

// An upload that is cut is never taken for a whole archive.
func TestRestoreOfACutUpload(t *testing.T) {
	f := newFixture(t, "")
	ctx, cut := context.WithCancel(t.Context())
	stream, err := f.client.Restore(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&adminv1.RestoreRequest{Chunk: []byte("half")}); err != nil {
		t.Fatal(err)
	}
	cut()
	if err := <-f.archives.restored; err == nil {
		t.Errorf("the archive %q ended well", f.archives.read)
	}
}

func TestTailAudit(t *testing.T) {
	f := newFixture(t, "")
	for _, action := range []string{"a", "b", "c"} {
		if err := f.store.Audit(audit.Event{Action: action}); err != nil {
			t.Fatal(err)
		}
	}
	stream, err := f.client.TailAudit(t.Context(), &adminv1.TailAuditRequest{Last: 2})
	if err != nil {
		t.Fatal(err)
	}
	wantLines(t, stream, "b", "c")
	if _, err := stream.Recv(); err != io.EOF {
		t.Errorf("behind the end: %v", err)
	}
	stream, err = f.client.TailAudit(t.Context(), &adminv1.TailAuditRequest{Last: -1})
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
}

func wantLines(t *testing.T, stream adminv1.AdminService_TailAuditClient, want ...string) {
	t.Helper()
	for _, line := range want {
		resp, err := stream.Recv()
		if err != nil || resp.GetLine() != line {
			t.Fatalf("got %v, %v; want %q", resp, err, line)
		}
	}
}

// Whoever follows the log is told that the daemon ends, and does not keep it from doing so.
func TestFollowersDoNotHoldUpTheEnd(t *testing.T) {
	f := newFixture(t, "")
	if err := f.store.Audit(audit.Event{Action: "a"}); err != nil {
		t.Fatal(err)
	}
	stream, err := f.client.TailAudit(t.Context(), &adminv1.TailAuditRequest{Last: 1, Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	wantLines(t, stream, "a")
	if err := f.store.Audit(audit.Event{Action: "b"}); err != nil {
		t.Fatal(err)
	}
	wantLines(t, stream, "b")
	if err := f.stop(); err != nil {
		t.Error(err)
	}
	// A stream that was cut off when the time to drain was over would say something else.
	_, err = stream.Recv()
	if s := status.Convert(err); s.Code() != codes.Unavailable || s.Message() != "msbd is stopping" {
		t.Errorf("the follower got %v", err)
	}
}

// A backup in progress is finished first.
func TestBackupsAreFinishedAtTheEnd(t *testing.T) {
	f := newFixture(t, "")
	begun, goOn := make(chan struct{}), make(chan struct{})
	f.server.Backups = writing(func(w io.Writer) error {
		if _, err := io.WriteString(w, "first "); err != nil {
			return err
		}
		close(begun)
		<-goOn
		_, err := io.WriteString(w, "second")
		return err
	})
	type result struct {
		archive string
		err     error
	}
	results := make(chan result)
	go func() {
		archive, err := f.backup(t)
		results <- result{archive, err}
	}()
	<-begun
	ended := make(chan error)
	go func() { ended <- f.stop() }()
	for { // until the end has begun: new calls are not taken
		if _, err := f.client.GetStatus(t.Context(), &adminv1.GetStatusRequest{}); err != nil {
			break
		}
	}
	close(goOn)
	if r := <-results; r.err != nil || r.archive != "first second" {
		t.Errorf("got %q, %v", r.archive, r.err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// writing is a Backups of one function.
type writing func(io.Writer) error

func (write writing) Write(_ context.Context, w io.Writer, _ uint32) error { return write(w) }

func (writing) Restore(context.Context, io.Reader, uint32) (keys.Restored, error) {
	return keys.Restored{}, errdefs.ErrNotImplemented
}

func TestVerifyAudit(t *testing.T) {
	f := newFixture(t, "")
	if err := f.store.Audit(audit.Event{Action: "a"}); err != nil {
		t.Fatal(err)
	}
	want := &adminv1.VerifyAuditResponse{Entries: 1, Hash: "h", Path: "/state/audit.jsonl"}
	got, err := f.client.VerifyAudit(t.Context(), &adminv1.VerifyAuditRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	f.store.problem = errors.New("line 2: changed")
	want.Problem = "line 2: changed"
	// A broken log must not keep anyone from hearing about it.
	f.state = adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED
	if got, err = f.client.VerifyAudit(t.Context(), &adminv1.VerifyAuditRequest{}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}
