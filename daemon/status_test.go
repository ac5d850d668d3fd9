package daemon

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

func TestMain(m *testing.M) {
	store.RunCheckIfChild()
	os.Exit(m.Run())
}

// The status warns of insecure settings as long as the server runs.
func TestStatusWarnsOfInsecureSettings(t *testing.T) {
	t.Parallel()
	dir, log := filepath.Join(t.TempDir(), "state"), slog.New(slog.DiscardHandler)
	state, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer state.Close()
	issuer, _, err := keys.Open(keys.Options{KeyringPath: filepath.Join(dir, "keyring.json"), Store: state, Log: log})
	if err != nil {
		t.Fatal(err)
	}
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

// The status and the metrics show what is left for starts. What is not known is absent.
func TestRoomForStarts(t *testing.T) {
	t.Parallel()
	dir, log := filepath.Join(t.TempDir(), "state"), slog.New(slog.DiscardHandler)
	state, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer state.Close()
	issuer, _, err := keys.Open(keys.Options{KeyringPath: filepath.Join(dir, "keyring.json"), Store: state, Log: log})
	if err != nil {
		t.Fatal(err)
	}
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
				values[name] = m.GetGauge().GetValue()
			}
		}
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
