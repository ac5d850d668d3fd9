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

// large is an archive that exceeds the limit on messages and is not a multiple of the chunk size.
var large = strings.Repeat("an archive ", 500_000)

func TestBackup(t *testing.T) {
	f := newFixture(t, "root")
	f.peer = peer.Peer{UID: 1234, Groups: []uint32{0}}
	f.backups.content = large
	if got, err := f.backup(t); err != nil || got != large || f.backups.by != 1234 {
		t.Errorf("got %d of %d bytes, error %v, by uid %d, want 1234", len(got), len(large), err, f.backups.by)
	}
	f.backups.err = fmt.Errorf("the disk is gone: %w", errdefs.ErrFailedPrecondition)
	if _, err := f.backup(t); status.Code(err) != codes.FailedPrecondition || status.Convert(err).Message() != "the disk is gone" {
		t.Errorf("a backup that fails after the last chunk: %v", err)
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
			if err := stream.Send(&adminv1.RestoreRequest{}); err != nil { // an empty chunk does not end the archive
				t.Fatal(err)
			}
		}
		resp, err := stream.CloseAndRecv()
		<-f.backups.restored
		return resp, err
	}
	resp, err := restore()
	if err != nil {
		t.Fatal(err)
	}
	if f.backups.read != large {
		t.Errorf("got %d of %d bytes", len(f.backups.read), len(large))
	}
	want := &adminv1.RestoreResponse{
		SigningKeyId: f.server.Keys.SigningKey().ID, Live: 2, Invalidated: 1, TakenAt: timestamppb.New(time.Unix(9, 0)),
	}
	if diff := cmp.Diff(want, resp, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	f.backups.err = fmt.Errorf("the archive is damaged: %w", errdefs.ErrDataLoss)
	if _, err := restore(); status.Code(err) != codes.DataLoss {
		t.Error(err)
	}
}

// An interrupted upload is never mistaken for a complete archive.
func TestRestoreOfAnInterruptedUpload(t *testing.T) {
	f := newFixture(t, "")
	ctx, interrupt := context.WithCancel(t.Context())
	stream, err := f.client.Restore(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&adminv1.RestoreRequest{Chunk: []byte("half")}); err != nil {
		t.Fatal(err)
	}
	interrupt()
	if err := <-f.backups.restored; err == nil {
		t.Errorf("the interrupted archive %q was read without an error", f.backups.read)
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
		t.Errorf("after the last entry: got error %v, want EOF", err)
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

// When the daemon stops, it ends the streams that follow the audit log, so that they do not delay its exit.
func TestFollowersDoNotDelayShutdown(t *testing.T) {
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
	// A stream that was aborted after drainTimeout would have a different error.
	_, err = stream.Recv()
	if s := status.Convert(err); s.Code() != codes.Unavailable || s.Message() != "msbd is stopping" {
		t.Errorf("the follower got error %v, want Unavailable: msbd is stopping", err)
	}
}

// When the daemon stops, it waits for a backup in progress.
func TestShutdownWaitsForBackups(t *testing.T) {
	f := newFixture(t, "")
	started, resume := make(chan struct{}), make(chan struct{})
	f.server.Backups = writeFunc(func(w io.Writer) error {
		if _, err := io.WriteString(w, "first "); err != nil {
			return err
		}
		close(started)
		<-resume
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
	<-started
	stopped := make(chan error)
	go func() { stopped <- f.stop() }()
	for { // until the server has started to drain and refuses new calls
		if _, err := f.client.GetStatus(t.Context(), &adminv1.GetStatusRequest{}); err != nil {
			break
		}
	}
	close(resume)
	if r := <-results; r.err != nil || r.archive != "first second" {
		t.Errorf("got %q, %v", r.archive, r.err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// writeFunc is a Backups that only writes.
type writeFunc func(io.Writer) error

func (f writeFunc) Write(_ context.Context, w io.Writer, _ uint32) error { return f(w) }

func (writeFunc) Restore(context.Context, io.Reader, uint32) (keys.Restored, error) {
	return keys.Restored{}, errdefs.ErrNotImplemented
}

func TestVerifyAudit(t *testing.T) {
	f := newFixture(t, "")
	if err := f.store.Audit(audit.Event{Action: "a"}); err != nil {
		t.Fatal(err)
	}
	segment := &adminv1.AuditSegment{Path: "/state/audit-1-2.jsonl", First: 1, Last: 2, Hash: "g", Absent: true}
	want := &adminv1.VerifyAuditResponse{Entries: 1, Hash: "h", Path: "/state/audit.jsonl", Segments: []*adminv1.AuditSegment{segment}}
	got, err := f.client.VerifyAudit(t.Context(), &adminv1.VerifyAuditRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	f.store.auditErr = errors.New("line 2: changed")
	want.Problem = "line 2: changed"
	// A damaged log degrades the daemon, which must still report the damage.
	f.state = adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED
	if got, err = f.client.VerifyAudit(t.Context(), &adminv1.VerifyAuditRequest{}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestSealAndAcknowledgeAudit(t *testing.T) {
	f := newFixture(t, "root")
	f.peer = peer.Peer{UID: 1234, Groups: []uint32{0}}
	sealed, err := f.client.SealAudit(t.Context(), &adminv1.SealAuditRequest{})
	if err != nil || sealed.GetSegment().GetPath() != "/state/audit-1-2.jsonl" {
		t.Errorf("SealAudit: %v, %v", sealed, err)
	}
	acknowledged, err := f.client.AcknowledgeAudit(t.Context(), &adminv1.AcknowledgeAuditRequest{})
	if err != nil || len(acknowledged.GetProblems()) != 1 {
		t.Errorf("AcknowledgeAudit: %v, %v", acknowledged, err)
	}
	want := []audit.Event{{Action: audit.LogSeal, Actor: "uid:1234"}, {Action: audit.LogAcknowledge, Actor: "uid:1234"}}
	if diff := cmp.Diff(want, f.store.TakeEvents()); diff != "" {
		t.Error(diff)
	}
}
