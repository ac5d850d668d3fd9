package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

func TestMain(m *testing.M) {
	store.RunCheckIfChild()
	os.Exit(m.Run())
}

// openState opens a new store and keyring. The store is closed when the test ends.
func openState(t *testing.T) (*store.Store, *keys.Issuer) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	state, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { state.Close() })
	issuer, _, err := keys.Open(keys.Options{KeyringPath: filepath.Join(dir, "keyring.json"), Store: state, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return state, issuer
}

// The status warns of insecure settings as long as the server runs.
func TestStatusWarnsOfInsecureSettings(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.DiscardHandler)
	state, issuer := openState(t)
	memory := func() (available, total uint64, err error) { return 10 << 30, 20 << 30, nil } // the reserve is 1 GiB
	manager := sandbox.NewManager(sandbox.Options{Store: state, HostMemory: memory, Log: log})
	defer manager.Close()
	for name, tt := range map[string]struct {
		change func(*config.Config)
		want   string // empty: no warning
	}{
		"by default":     {func(*config.Config) {}, ""},
		"dev mode":       {func(c *config.Config) { c.Dev = true }, "dev mode"},
		"behind a proxy": {func(c *config.Config) { c.InsecureBehindProxy = true }, "insecure_behind_proxy"},
		"with TLS":       {func(c *config.Config) { c.InsecureBehindProxy, c.TLSCert = true, "cert.pem" }, ""},
	} {
		cfg := config.Default()
		cfg.MaxConnections = 100
		tt.change(&cfg)
		s := &status{cfg: cfg, address: cfg.Listen, store: state, issuer: issuer, manager: manager, log: log}
		warnings := s.report().GetWarnings()
		switch {
		case tt.want == "" && len(warnings) == 0:
		case tt.want != "" && len(warnings) == 1 && strings.HasPrefix(warnings[0], tt.want) && strings.Contains(warnings[0], cfg.Listen):
		default:
			t.Errorf("%s: warnings are %q, want %q", name, warnings, tt.want)
		}
	}
}

// metrics returns the values that GET /metrics reports for s, by the name of the metric and the values of its labels.
func metrics(t *testing.T, s *status) map[string]float64 {
	t.Helper()
	families, err := newMetrics(s).Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			values[name] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return values
}

// The status and the metrics show what is left for starts. What is not known is absent.
func TestRoomForStarts(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.DiscardHandler)
	state, issuer := openState(t)
	for _, measured := range []bool{true, false} {
		memory := func() (available, total uint64, err error) { // the reserve is 1 GiB
			if !measured {
				return 0, 0, errors.New("no memory")
			}
			return 10 << 30, 20 << 30, nil
		}
		manager := sandbox.NewManager(sandbox.Options{Store: state, HostMemory: memory, Log: log})
		defer manager.Close()
		s := &status{cfg: config.Config{TotalSandboxes: 7}, store: state, issuer: issuer, manager: manager, log: log}
		got := s.report().GetCapacity()
		if (got.AvailableMemoryMib != nil) != measured || measured && got.GetAvailableMemoryMib() != 9<<10 || got.GetMaxSandboxes() != 7 {
			t.Errorf("measured %t: capacity %v", measured, got)
		}
		if space := state.Space(); space.TotalBytes > 0 && got.GetFreeDiskMib() != int64(space.FreeBytes>>20) {
			t.Errorf("capacity %v, want the free space of %+v", got, space)
		}
		values := metrics(t, s)
		for name, want := range map[string]float64{"msbd_sandboxes_limit": 7, "msbd_starts in_progress": 0, "msbd_starts waiting": 0} {
			if value, ok := values[name]; !ok || value != want {
				t.Errorf("%s is %g, present: %t, want %g", name, value, ok, want)
			}
		}
		if value, ok := values["msbd_memory_available_bytes"]; ok != measured || measured && value != 9<<30 {
			t.Errorf("msbd_memory_available_bytes is %g, present: %t", value, ok)
		}
	}
}

// The status and the metrics show the pool.
func TestStatusShowsThePool(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		log := slog.New(slog.DiscardHandler)
		state, issuer := openState(t)
		manager := sandbox.NewManager(sandbox.Options{
			Store: state, Runtime: sandboxtest.NewRuntime(), Connect: sandboxtest.NewGuest().Connect,
			Defaults: sandbox.Config{Template: sandbox.Template{Image: "python", CPUs: 1, MemoryMiB: 512}}, MaxCPUs: 1, MaxMemoryMiB: 512, Boots: 1,
			Pool: sandbox.PoolOptions{Min: 2, Max: 2}, HostMemory: func() (available, total uint64, err error) { return 64 << 30, 64 << 30, nil },
			CheckSpace: state.CheckSpace, MakeRoom: state.MakeRoom, Quota: func(string) sandbox.Quota { return sandbox.Quota{} },
			StartTimeout: time.Minute, Log: log,
		})
		defer manager.Close()
		s := &status{store: state, issuer: issuer, manager: manager, log: log}
		if got := s.report().GetPool(); got.GetOff() != "" || got.GetReady() != 0 {
			t.Errorf("before the recovery: pool %v", got)
		}
		if _, err := manager.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- manager.RunPool(ctx) }()
		synctest.Wait()
		began := time.Now()
		created := float64(began.Unix())
		if err := manager.Start(t.Context(), sandbox.Name{Namespace: "default", Name: "one"}, sandbox.Request{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // a refill does not begin at once
		synctest.Wait()
		pool := &adminv1.PoolSummary{Ready: 2, Target: 2, Hits: 1, Oldest: timestamppb.New(began), CpuSeconds: 2, MemoryBytes: 10 << 20}
		if diff := cmp.Diff(pool, s.report().GetPool(), protocmp.Transform()); diff != "" {
			t.Errorf("status: %s", diff)
		}
		values := metrics(t, s)
		for name, want := range map[string]float64{
			"entries 1 0 python 512": 2, "hits_total 1 0 python 512": 1, "misses_total 1 0 python 512": 0, "refill_failures_total 1 0 python 512": 0,
			"entry_created_timestamp_seconds 1 0 1 python 512": created, "entry_created_timestamp_seconds 1 0 2 python 512": created,
			"entry_cpu_seconds 1 0 1 python 512": 1, "entry_cpu_seconds 1 0 2 python 512": 1,
			"entry_memory_bytes 1 0 1 python 512": 5 << 20, "entry_memory_bytes 1 0 2 python 512": 5 << 20,
		} {
			if value, ok := values["msbd_pool_"+name]; !ok || value != want {
				t.Errorf("msbd_pool_%s is %g, present: %t, want %g", name, value, ok, want)
			}
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestConnectionWarning(t *testing.T) {
	if w := connectionWarning(10000, 10000, 20000); w != "" {
		t.Errorf("warning with enough descriptors: %s", w)
	}
	if w := connectionWarning(10000, 512, 1024); !strings.Contains(w, "1024 open files") || !strings.Contains(w, "only 512 connections") {
		t.Errorf("warning is %q", w)
	}
}

// hasMicroVMs does not depend on the Manager, which lists no sandboxes before it has recovered. A server that stops then
// must leave containerd running.
func TestHasMicroVMs(t *testing.T) {
	t.Parallel()
	db, err := store.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, step := range []struct {
		state sandbox.State
		want  bool
	}{{"", false}, {sandbox.Starting, true}, {sandbox.Running, true}, {sandbox.Stopping, true}, {sandbox.Failed, false}} {
		if step.state != "" {
			if err := db.PutSandbox(sandbox.Record{ID: "1f0c9a2b5d6e7f803a4b", State: step.state}); err != nil {
				t.Fatal(err)
			}
		}
		if got := hasMicroVMs(db); got != step.want {
			t.Errorf("with a sandbox in state %q: got %t, want %t", step.state, got, step.want)
		}
	}
}
