package admin

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/msbd/msbd/api/audit"
	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// The summary adds up all pools.
func TestPoolSummary(t *testing.T) {
	entry := func(at int64, cpu time.Duration, memory uint64) sandbox.EntryStatus {
		return sandbox.EntryStatus{CreatedAt: time.Unix(at, 0), CPU: cpu, MemoryBytes: memory}
	}
	for _, c := range []struct {
		status sandbox.PoolStatus
		want   *adminv1.PoolSummary
	}{
		{sandbox.PoolStatus{Off: "no"}, &adminv1.PoolSummary{Off: "no"}},
		{sandbox.PoolStatus{Templates: []sandbox.TemplateStatus{{Target: 1, Misses: 2}}}, &adminv1.PoolSummary{Target: 1, Misses: 2}},
		{sandbox.PoolStatus{Templates: []sandbox.TemplateStatus{
			{Target: 2, Ready: 1, Hits: 3, Misses: 4, Entries: []sandbox.EntryStatus{entry(8, time.Second, 10), entry(9, time.Second, 20)}},
			{Target: 1, Ready: 1, Hits: 5, Misses: 6, Entries: []sandbox.EntryStatus{entry(7, time.Second/2, 30)}},
		}}, &adminv1.PoolSummary{Target: 3, Ready: 2, Hits: 8, Misses: 10, Oldest: timestamppb.New(time.Unix(7, 0)), CpuSeconds: 2.5, MemoryBytes: 60}},
	} {
		if diff := cmp.Diff(c.want, PoolSummary(c.status), protocmp.Transform()); diff != "" {
			t.Errorf("%+v: %s", c.status, diff)
		}
	}
}

func TestPool(t *testing.T) {
	f := newFixture(t, "")
	f.sandboxes.pool = sandbox.PoolStatus{MemoryMiB: 512, MaxMemoryMiB: 1024, Templates: []sandbox.TemplateStatus{{
		PoolSize: sandbox.PoolSize{Template: sandbox.Template{Image: "i", CPUs: 1, MemoryMiB: 512, DiskMiB: 4096}, Min: 1, Max: 4},
		Default:  true, Target: 2, Ready: 1, Filling: true, Hits: 3, Misses: 4, Failures: 5, LastError: "no", Waits: "busy",
		RetryAt: time.Unix(7, 0), Entries: []sandbox.EntryStatus{{ID: "e", CreatedAt: time.Unix(8, 0), CPU: time.Second, MemoryBytes: 9}},
	}}}
	got, err := f.client.PoolStatus(t.Context(), &adminv1.PoolStatusRequest{})
	want := &adminv1.PoolStatusResponse{MemoryMib: 512, MaxMemoryMib: 1024, Pools: []*adminv1.Pool{{
		Template: &adminv1.PoolTemplate{Image: "i", Cpus: 1, MemoryMib: 512, DiskMib: 4096}, IsDefault: true, Min: 1, Max: 4, Target: 2, Ready: 1,
		Filling: true, Hits: 3, Misses: 4, Failures: 5, LastError: "no", Waits: "busy",
		RetryAt: timestamppb.New(time.Unix(7, 0)), Entries: []*adminv1.PoolEntry{{Id: "e", CreatedAt: timestamppb.New(time.Unix(8, 0)), CpuSeconds: 1, MemoryBytes: 9}},
	}}}
	if diff := cmp.Diff(want, got, protocmp.Transform()); err != nil || diff != "" {
		t.Errorf("status: error %v, %s", err, diff)
	}
	if events := f.store.TakeEvents(); len(events) != 0 {
		t.Errorf("the status wrote to the audit log: %v", events)
	}

	req := &adminv1.SetPoolRequest{Template: &adminv1.PoolTemplate{Image: "other", MemoryMib: 600}, Min: 1, Max: 2}
	set, err := f.client.SetPool(t.Context(), req)
	if diff := cmp.Diff(&adminv1.PoolTemplate{Image: "other", Cpus: 1, MemoryMib: 512, DiskMib: 4096}, set.GetTemplate(), protocmp.Transform()); err != nil || diff != "" {
		t.Errorf("set: error %v, %s", err, diff)
	}
	if got := fmt.Sprint(f.sandboxes.poolSets); got != fmt.Sprintf("[%+v 1 2]", sandbox.Request{Image: "other", MemoryMiB: 600}) {
		t.Errorf("set %s", got)
	}
	if e := f.store.TakeEvents(); len(e) != 1 || e[0].Action != audit.PoolSet || e[0].Target != "other" || e[0].Detail["max"] != "2" {
		t.Errorf("audit log: %+v", e)
	}
	f.sandboxes.poolErr = errors.New("no")
	if _, err := f.client.SetPool(t.Context(), req); err == nil {
		t.Error("a size that was refused is no error")
	}
}
