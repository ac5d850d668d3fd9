package store

import (
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// A record of the version before Template and Binding is read, and written again, as it was.
func TestRecordFormat(t *testing.T) {
	const old = `{"id":"a1a1a1a1a1a1a1a1a1a1","name":{"namespace":"default","name":"x"},"config":{"image":"microsandbox/python","cpus":2,` +
		`"memory_mib":512,"disk_mib":4096,"env":["A=b"],"workdir":"/w","user":"app","hostname":"web"},"state":"running","created_at":"2026-01-02T03:04:05Z"}`
	want := sandbox.Record{
		ID: "a1a1a1a1a1a1a1a1a1a1", Name: sandbox.Name{Namespace: "default", Name: "x"}, State: sandbox.Running,
		Config: sandbox.Config{
			Template: sandbox.Template{Image: "microsandbox/python", CPUs: 2, MemoryMiB: 512, DiskMiB: 4096},
			Binding:  sandbox.Binding{Env: []string{"A=b"}, Workdir: "/w", User: "app", Hostname: "web"},
		},
		CreatedAt: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	}
	var got sandbox.Record
	if err := decode(sandboxBucket, got.ID, []byte(old), &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	again, err := json.Marshal(got)
	if err != nil || string(again) != old {
		t.Errorf("written again, it is\n%s\nwant\n%s\nerror %v", again, old, err)
	}
}
