package daemon

import (
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
	manager := sandbox.NewManager(sandbox.Options{Store: state, Log: log})
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
