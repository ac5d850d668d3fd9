package admin

import (
	"context"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/msbd/msbd/api/audit"
	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

var from = netip.MustParseAddr("192.0.2.7")

func (f *fixture) createKey(t *testing.T, req *adminv1.CreateKeyRequest) *adminv1.CreateKeyResponse {
	t.Helper()
	resp, err := f.client.CreateKey(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func TestCreateKey(t *testing.T) {
	f := newFixture(t, "")
	resp := f.createKey(t, &adminv1.CreateKeyRequest{
		Expire: "1w", Namespaces: []string{"project-web", "a"}, Name: "ci", Scopes: []string{"sandbox:read", "sandbox:exec"},
	})
	p, err := f.verifier.Verify(resp.GetKey(), from)
	if err != nil {
		t.Fatal(err)
	}
	info := resp.GetInfo()
	if p.KeyID != info.GetId() || !p.Allows("project-web") || p.Allows("b") || !p.Has(keys.ScopeExec) || p.Has(keys.ScopeStart) {
		t.Errorf("the key has the principal %+v, but its info is %v", p, info)
	}
	want := &adminv1.Key{
		Id: info.GetId(), Name: "ci", Namespaces: []string{"a", "project-web"}, Scopes: []string{"sandbox:exec", "sandbox:read"},
		State: adminv1.KeyState_KEY_STATE_LIVE, CreatedAt: info.GetCreatedAt(), SigningKeyId: f.server.Keys.SigningKey().ID,
		ExpiresAt: timestamppb.New(info.GetCreatedAt().AsTime().Add(7 * 24 * time.Hour)),
	}
	if diff := cmp.Diff(want, info, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if strings.Contains(f.log.String(), resp.GetKey()) || !strings.Contains(f.log.String(), info.GetId()) {
		t.Errorf("the log must have the key's id but not the key:\n%s", f.log.String())
	}

	resp = f.createKey(t, &adminv1.CreateKeyRequest{})
	if info := resp.GetInfo(); info.GetExpiresAt() != nil || len(info.GetNamespaces()) != 0 || len(info.GetScopes()) != 0 {
		t.Errorf("key without limits: got %v", info)
	}
	for _, bad := range []*adminv1.CreateKeyRequest{
		{Expire: "7"}, {Expire: "1fortnight"}, {Namespaces: []string{"../x"}}, {Namespaces: []string{""}}, {Scopes: []string{"sandbox:everything"}}, {Name: "a b"},
	} {
		if _, err := f.client.CreateKey(t.Context(), bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("CreateKey(%v): got error %v, want InvalidArgument", bad, err)
		}
	}
	if _, err := f.client.CreateKey(t.Context(), &adminv1.CreateKeyRequest{Name: "ci"}); status.Code(err) != codes.AlreadyExists {
		t.Errorf("duplicate name: got error %v, want AlreadyExists", err)
	}
	if n := len(f.store.Records()); n != 2 {
		t.Errorf("the store has %d keys, want 2", n)
	}
}

func TestListKeys(t *testing.T) {
	f := newFixture(t, "")
	const n = 5
	var want []string // oldest first
	for i := range n {
		req := new(adminv1.CreateKeyRequest)
		if i == 1 {
			req.Namespaces = []string{"a"}
		}
		key := f.createKey(t, req).GetInfo()
		want = append(want, key.GetId())
		for time.Now().UnixMilli() == key.GetCreatedAt().AsTime().UnixMilli() { // keys created in the same millisecond have no order
		}
	}
	revoked, err := f.client.RevokeKey(t.Context(), &adminv1.RevokeKeyRequest{Ref: want[3]})
	if err != nil {
		t.Fatal(err)
	}
	list := func(req *adminv1.ListKeysRequest) (ids []string, pages int) {
		t.Helper()
		for {
			resp, err := f.client.ListKeys(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			if req.PageSize > 0 && len(resp.GetKeys()) > int(req.PageSize) {
				t.Errorf("a page has %d keys, want at most %d", len(resp.GetKeys()), req.PageSize)
			}
			for _, k := range resp.GetKeys() {
				ids = append(ids, k.GetId())
			}
			pages++
			if req.PageToken = resp.GetNextPageToken(); req.PageToken == "" {
				return ids, pages
			}
		}
	}
	got, pages := list(&adminv1.ListKeysRequest{PageSize: 2})
	if diff := cmp.Diff(want, got); diff != "" || pages != 3 {
		t.Errorf("got %d pages, want 3; ids (-want +got):\n%s", pages, diff)
	}
	if got, pages := list(&adminv1.ListKeysRequest{PageSize: 1 << 30}); len(got) != n || pages != 1 {
		t.Errorf("with a huge page size: got %v in %d pages, want %d keys in 1 page", got, pages, n)
	}
	got, _ = list(&adminv1.ListKeysRequest{State: adminv1.KeyState_KEY_STATE_REVOKED})
	if diff := cmp.Diff([]string{revoked.GetKey().GetId()}, got); diff != "" {
		t.Error(diff)
	}
	got, _ = list(&adminv1.ListKeysRequest{Namespace: "b", State: adminv1.KeyState_KEY_STATE_LIVE})
	if diff := cmp.Diff([]string{want[0], want[2], want[4]}, got); diff != "" {
		t.Error(diff)
	}
	if got, _ = list(&adminv1.ListKeysRequest{UnusedFor: "1d"}); got != nil {
		t.Errorf("new keys are listed as unused for a day: %v", got)
	}
	for _, bad := range []*adminv1.ListKeysRequest{{PageSize: -1}, {State: 9}, {UnusedFor: "x"}, {Namespace: "../x"}, {PageToken: "x"}} {
		if _, err := f.client.ListKeys(t.Context(), bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("ListKeys(%v): got error %v, want InvalidArgument", bad, err)
		}
	}
}

// Pages have a default size and a maximum size.
func TestPageSizes(t *testing.T) {
	f := newFixture(t, "")
	recorder := new(limitRecorder)
	f.server.Keys = recorder
	for size, want := range map[int32]int{0: defaultPage, 1: 1, maxPage: maxPage, maxPage + 1: maxPage} {
		if _, err := f.client.ListKeys(t.Context(), &adminv1.ListKeysRequest{PageSize: size}); err != nil || recorder.limit != want {
			t.Errorf("page size %d became %d, want %d, error %v", size, recorder.limit, want, err)
		}
	}
}

// limitRecorder records the limit that List was called with.
type limitRecorder struct {
	Keys
	limit int
}

func (r *limitRecorder) List(_ keys.Filter, _ string, limit int) ([]keys.Key, string, error) {
	r.limit = limit
	return nil, "", nil
}

func TestUseAndRevocationOfAKey(t *testing.T) {
	f := newFixture(t, "")
	created := f.createKey(t, &adminv1.CreateKeyRequest{Name: "ci"})
	p, err := f.verifier.Verify(created.GetKey(), from)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := p.Bind(t.Context())
	defer cancel()
	for _, ref := range []string{"ci", created.GetInfo().GetId(), created.GetInfo().GetId()[:6]} {
		resp, err := f.client.GetKey(t.Context(), &adminv1.GetKeyRequest{Ref: ref})
		if k := resp.GetKey(); err != nil || k.GetId() != p.KeyID || k.GetRequests() != 1 || k.GetLastUsedAt() == nil || k.GetLastUsedFrom() != from.String() {
			t.Errorf("GetKey(%q): %v, %v", ref, resp, err)
		}
	}
	resp, err := f.client.RevokeKey(t.Context(), &adminv1.RevokeKeyRequest{Ref: "ci"})
	if k := resp.GetKey(); err != nil || k.GetState() != adminv1.KeyState_KEY_STATE_REVOKED || k.GetRevocation() != "revoked" || k.GetRevokedAt() == nil {
		t.Errorf("RevokeKey: %v, %v", resp, err)
	}
	if _, err := f.verifier.Verify(created.GetKey(), from); err == nil {
		t.Error("a revoked key is accepted")
	}
	select {
	case <-ctx.Done(): // Bind cancels it in another goroutine, a moment after RevokeKey has returned
	case <-time.After(time.Minute):
		t.Error("requests in progress were not canceled")
	}
	for _, ref := range []string{"no-such-key", "0000000000000000"} {
		_, get := f.client.GetKey(t.Context(), &adminv1.GetKeyRequest{Ref: ref})
		_, revoke := f.client.RevokeKey(t.Context(), &adminv1.RevokeKeyRequest{Ref: ref})
		_, rotate := f.client.RotateKey(t.Context(), &adminv1.RotateKeyRequest{Ref: ref})
		for _, err := range []error{get, revoke, rotate} {
			if status.Code(err) != codes.NotFound {
				t.Errorf("%q: got error %v, want NotFound", ref, err)
			}
		}
	}
	want := []audit.Event{{Action: audit.KeyCreate}, {Action: audit.KeyRevoke}}
	got := f.store.TakeEvents()
	for i := range got {
		if got[i].Actor != "uid:0" || got[i].Target != p.KeyID {
			t.Errorf("audit event %+v, want actor uid:0 and target %s", got[i], p.KeyID)
		}
		got[i] = audit.Event{Action: got[i].Action}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestRotateKey(t *testing.T) {
	f := newFixture(t, "")
	first := f.createKey(t, &adminv1.CreateKeyRequest{Name: "ci", Namespaces: []string{"a"}, Scopes: []string{"sandbox:exec"}, Expire: "1w"})
	resp, err := f.client.RotateKey(t.Context(), &adminv1.RotateKeyRequest{Ref: "ci", Grace: "1h"})
	if err != nil {
		t.Fatal(err)
	}
	created, old := resp.GetInfo(), resp.GetOld()
	if created.GetName() != "ci" || created.GetId() == old.GetId() || !cmp.Equal(created.GetNamespaces(), []string{"a"}) ||
		!cmp.Equal(created.GetScopes(), []string{"sandbox:exec"}) || created.GetExpiresAt() == nil || created.GetState() != adminv1.KeyState_KEY_STATE_LIVE {
		t.Errorf("new key: %v", created)
	}
	if old.GetId() != first.GetInfo().GetId() || old.GetState() != adminv1.KeyState_KEY_STATE_LIVE || old.GetReplacedBy() != created.GetId() ||
		old.GetRevocation() != "rotated" || old.GetRevokedAt() == nil {
		t.Errorf("old key: %v", old)
	}
	for _, key := range []string{first.GetKey(), resp.GetKey()} {
		if _, err := f.verifier.Verify(key, from); err != nil {
			t.Errorf("a key is refused during the grace period: %v", err)
		}
	}
	again, err := f.client.RotateKey(t.Context(), &adminv1.RotateKeyRequest{Ref: "ci", Expire: "1y"})
	if err != nil || again.GetOld().GetState() != adminv1.KeyState_KEY_STATE_REVOKED {
		t.Errorf("without a grace period: %v, %v", again, err)
	}
	if _, err := f.verifier.Verify(resp.GetKey(), from); err == nil {
		t.Error("a key that was rotated without a grace period is accepted")
	}
	for _, bad := range []*adminv1.RotateKeyRequest{{Ref: "ci", Grace: "x"}, {Ref: "ci", Expire: "x"}, {Ref: ""}} {
		if _, err := f.client.RotateKey(t.Context(), bad); status.Code(err) != codes.InvalidArgument && status.Code(err) != codes.NotFound {
			t.Errorf("RotateKey(%v): got error %v, want InvalidArgument or NotFound", bad, err)
		}
	}
	if strings.Contains(f.log.String(), resp.GetKey()) {
		t.Error("the log contains the key")
	}
}

func TestPruneKeys(t *testing.T) {
	f := newFixture(t, "")
	f.createKey(t, &adminv1.CreateKeyRequest{Name: "live"})
	f.createKey(t, &adminv1.CreateKeyRequest{Name: "dead"})
	if _, err := f.client.RevokeKey(t.Context(), &adminv1.RevokeKeyRequest{Ref: "dead"}); err != nil {
		t.Fatal(err)
	}
	prune := func(req *adminv1.PruneKeysRequest) (names []string) {
		t.Helper()
		resp, err := f.client.PruneKeys(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range resp.GetKeys() {
			names = append(names, k.GetName())
		}
		return names
	}
	if got := prune(&adminv1.PruneKeysRequest{DeadFor: "30d"}); got != nil {
		t.Errorf("a key that was just revoked is pruned as dead for 30 days: %v", got)
	}
	if got := prune(&adminv1.PruneKeysRequest{DryRun: true}); !cmp.Equal(got, []string{"dead"}) || len(f.store.Records()) != 2 {
		t.Errorf("dry run: got %v, %d keys remain, want 2", got, len(f.store.Records()))
	}
	if got := prune(&adminv1.PruneKeysRequest{}); !cmp.Equal(got, []string{"dead"}) {
		t.Errorf("pruned %v", got)
	}
	if resp, err := f.client.ListKeys(t.Context(), &adminv1.ListKeysRequest{}); err != nil || len(resp.GetKeys()) != 1 {
		t.Errorf("%d keys remain, %v, want 1", len(resp.GetKeys()), err)
	}
	if _, err := f.client.PruneKeys(t.Context(), &adminv1.PruneKeysRequest{DeadFor: "x"}); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
}

func TestReset(t *testing.T) {
	f := newFixture(t, "")
	key := f.createKey(t, &adminv1.CreateKeyRequest{})
	resp, err := f.client.Reset(t.Context(), &adminv1.ResetRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if resp.GetInvalidated() != 1 || resp.GetSigningKeyId() == key.GetInfo().GetSigningKeyId() || resp.GetSigningKeyId() == "" {
		t.Errorf("got %v", resp)
	}
	if _, err := f.verifier.Verify(key.GetKey(), from); err == nil {
		t.Error("a key from before the reset is accepted")
	}
}

// clockKeys is Keys whose AcceptClock returns change.
type clockKeys struct {
	Keys
	change keys.ClockChange
	dryRun []bool // the arguments of the calls of AcceptClock
	by     uint32
}

func (k *clockKeys) AcceptClock(_ context.Context, dryRun bool, by uint32) (keys.ClockChange, error) {
	k.dryRun, k.by = append(k.dryRun, dryRun), by
	return k.change, nil
}

func TestAcceptClock(t *testing.T) {
	f := newFixture(t, "")
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	k := &clockKeys{Keys: f.server.Keys, change: keys.ClockChange{From: now.Add(time.Hour), To: now, Revived: 1, Expired: 2, Revoked: 3}}
	f.server.Keys = k
	for _, dryRun := range []bool{true, false} {
		resp, err := f.client.AcceptClock(t.Context(), &adminv1.AcceptClockRequest{DryRun: dryRun})
		if err != nil {
			t.Fatal(err)
		}
		got := keys.ClockChange{
			From: resp.GetFrom().AsTime(), To: resp.GetTo().AsTime(),
			Revived: int(resp.GetRevived()), Expired: int(resp.GetExpired()), Revoked: int(resp.GetRevoked()),
		}
		if got != k.change {
			t.Errorf("got %+v, want %+v", got, k.change)
		}
	}
	if !slices.Equal(k.dryRun, []bool{true, false}) || k.by != uint32(os.Geteuid()) {
		t.Errorf("the calls were dry runs: %v, by uid %d", k.dryRun, k.by)
	}
}

// aheadKeys is Keys with a clock that is two hours ahead.
type aheadKeys struct{ Keys }

func (k aheadKeys) Now() time.Time { return k.Keys.Now().Add(2 * time.Hour) }

// The state of a key is computed with the clock of Keys, which the verifier uses, not with the system clock.
func TestStateUsesTheClockOfKeys(t *testing.T) {
	f := newFixture(t, "")
	f.createKey(t, &adminv1.CreateKeyRequest{Name: "ci", Expire: "1h"})
	for keys, want := range map[Keys]adminv1.KeyState{
		f.server.Keys:            adminv1.KeyState_KEY_STATE_LIVE,
		aheadKeys{f.server.Keys}: adminv1.KeyState_KEY_STATE_EXPIRED,
	} {
		f.server.Keys = keys
		resp, err := f.client.GetKey(t.Context(), &adminv1.GetKeyRequest{Ref: "ci"})
		if err != nil || resp.GetKey().GetState() != want {
			t.Errorf("%T: got %v, want %v, error %v", keys, resp.GetKey().GetState(), want, err)
		}
	}
}
