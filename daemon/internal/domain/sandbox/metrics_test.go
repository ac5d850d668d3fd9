package sandbox_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	. "github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

func TestMetrics(t *testing.T) {
	f := newFixture(t)
	two := Name{"other", "two"}
	for _, name := range []Name{testName, two} {
		if err := f.Start(t.Context(), name, Request{}); err != nil {
			t.Fatal(err)
		}
	}
	all, err := f.Metrics(t.Context(), nil, "")
	if err != nil || len(all) != 2 {
		t.Fatalf("all: %v %v", all, err)
	}
	one, err := f.Metrics(t.Context(), []string{"default"}, "one")
	if err != nil || len(one) != 1 || one[0].CPUPercent == nil || *one[0].MemoryMiB != 5 || *one[0].DiskBytes != 77 || one[0].State != Running {
		t.Fatalf("one: %v %v", one, err)
	}
	for want, namespaces := range map[string][]string{
		"sandbox default/absent does not exist":                                 {"default"},
		"sandbox absent does not exist in any of the namespaces default, other": {"default", "other"},
		"sandbox absent does not exist in any namespace":                        {},
	} {
		if _, err := f.Metrics(t.Context(), namespaces, "absent"); !errdefs.IsNotFound(err) || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("absent from %q: got error %v, want %s", namespaces, err, want)
		}
	}
	if _, err := f.Metrics(t.Context(), []string{"default"}, "two"); !errdefs.IsNotFound(err) {
		t.Errorf("sandbox of another namespace: got error %v, want NotFound", err)
	}
}

// A guest that hangs does not delay the others, and is listed with its state.
func TestMetricsOfGuestsThatHang(t *testing.T) {
	for _, hanging := range []int{1, 500} {
		synctest.Test(t, func(t *testing.T) {
			f := newFixture(t)
			for i := range hanging + 40 {
				if err := f.Start(t.Context(), Name{"default", fmt.Sprintf("s%03d", i)}, Request{}); err != nil {
					t.Fatal(err)
				}
			}
			hangs := map[string]bool{}
			for _, rec := range f.List("")[:hanging] {
				hangs[rec.ID] = true
			}
			f.rt.OnUsage = func(ctx context.Context, id string) error {
				if hangs[id] {
					<-ctx.Done()
				}
				return ctx.Err()
			}
			time.Sleep(time.Second) // a processor time since the start
			start := time.Now()
			all, err := f.Metrics(t.Context(), nil, "")
			took := time.Since(start)
			if err != nil || len(all) != hanging+40 || hanging == 1 && took > 3*time.Second || took > 10*time.Second {
				t.Errorf("%d of %d hang: got %d metrics in %s, error %v", hanging, hanging+40, len(all), took, err)
			}
			measured := 0
			for _, m := range all {
				if m.State != Running {
					t.Errorf("%s: state %s", m.Name, m.State)
				}
				if (m.CPUPercent == nil) != (m.MemoryMiB == nil) || (m.MemoryMiB == nil) != (m.DiskBytes == nil) {
					t.Errorf("%s was measured in part: %+v", m.Name, m)
				}
				if m.MemoryMiB != nil {
					measured++
				}
			}
			if hanging == 1 && measured != 40 {
				t.Errorf("%d sandboxes were measured, want 40", measured)
			}
			f.Manager.Close()
		})
	}
}
