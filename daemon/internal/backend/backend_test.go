package backend

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/backend/kata"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

func TestMain(m *testing.M) {
	host.RunProbeIfChild()
	RunJailIfChild()
	os.Exit(m.Run())
}

// newConfig returns the configuration of a server with its own temporary directories and the programs of this checkout.
func newConfig(t *testing.T) config.Config {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "backend") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	bin, err := filepath.Abs("../../../bin")
	if err != nil {
		t.Fatal(err)
	}
	cfg := config.Default()
	cfg.StateDir, cfg.RunDir, cfg.LibDir = filepath.Join(dir, "state"), filepath.Join(dir, "run"), bin
	cfg.Hypervisor, cfg.Accelerator = host.Builtin, host.TCG
	for _, dir := range []string{cfg.StateDir, cfg.RunDir} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return cfg
}

// templates admits all builds of templates.
var templates = kata.TemplateBuilder{
	Admit:    func(ctx context.Context, _ int) (context.Context, func(), error) { return ctx, func() {}, nil },
	Rehearse: func(_ context.Context, conn io.ReadWriteCloser, _ string) error { return conn.Close() },
}

func TestRun(t *testing.T) {
	b, err := New(t.Context(), newConfig(t), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatalf("%v: run make build guest", err)
	}
	defer b.Close()
	ctx, cancel := context.WithCancel(t.Context())
	err = b.Run(ctx, templates, func(ctx context.Context) error {
		defer cancel()
		if containerd, kata, err := b.Versions(ctx); containerd == "" || kata == "" || err != nil {
			t.Errorf("Versions = %q, %q, %v", containerd, kata, err)
		}
		if found, err := b.Runtime.List(ctx); len(found) != 0 || err != nil {
			t.Errorf("List = %v, %v", found, err)
		}
		if _, err := b.Images.Resolve(ctx, "nothing"); !errdefs.IsNotFound(err) {
			t.Errorf("Resolve: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Errorf("Run: %v", err)
	}
	running, err := b.private.Process()
	if running == nil || err != nil {
		t.Fatalf("containerd does not keep running after Run: %v, %v", running, err)
	}
	defer running.Close()
	if err := b.Stop(t.Context()); err != nil || !running.Dead() {
		t.Errorf("Stop: dead %t, %v", running.Dead(), err)
	}
}

func TestRunReturnsErrorOfReady(t *testing.T) {
	b, err := New(t.Context(), newConfig(t), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	want := errors.New("not ready")
	if err := b.Run(t.Context(), templates, func(context.Context) error { return want }); !errors.Is(err, want) {
		t.Errorf("Run: %v", err)
	}
	if err := b.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// The hypervisor service starts VMs only if shims call it.
func TestServiceConfig(t *testing.T) {
	programs := kata.Settings{QEMU: "/qemu", Kernel: "/vmlinux", Initrd: "/initrd", Programs: []string{"/qemu", "/virtiofsd"}}
	cfg := config.Config{RunDir: "/run/msb"}
	for name, tt := range map[string]struct {
		change func(*kata.Settings)
		starts bool
	}{
		"builtin":                               {func(s *kata.Settings) { s.HypervisorSocket = serviceSocket(cfg) }, true},
		"Kata's own driver":                     {func(*kata.Settings) {}, false},
		"custom configuration":                  {func(s *kata.Settings) { s.Config = "/kata.toml" }, false},
		"custom configuration with the service": {func(s *kata.Settings) { s.Config, s.HypervisorSocket = "/kata.toml", serviceSocket(cfg) }, true},
	} {
		settings := programs
		tt.change(&settings)
		got := serviceConfig(cfg, host.Route{Accelerator: host.KVM}, settings, nil)
		if got.Socket != "/run/msb/hypervisor.sock" || got.Dir != "/run/msb/vm" || !slices.Equal(got.Programs, programs.Programs) {
			t.Errorf("%s: %+v", name, got)
		}
		if (got.QEMU != "") != tt.starts {
			t.Errorf("%s: QEMU %q", name, got.QEMU)
		}
		if tt.starts && (got.Accelerator != host.KVM || got.Kernel != "/vmlinux" || got.Initrd != "/initrd") {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// A server does not start if programs are missing that its route needs, unless it uses a custom Kata configuration, which
// may name others.
func TestShimSettings(t *testing.T) {
	cfg := newConfig(t)
	settings, err := shimSettings(t.Context(), cfg, host.Route{Hypervisor: host.Builtin})
	if err != nil || settings.HypervisorSocket != serviceSocket(cfg) || settings.QEMU == "" || len(settings.Programs) != 2 {
		t.Errorf("builtin: %+v, %v", settings, err)
	}
	settings, err = shimSettings(t.Context(), cfg, host.Route{Hypervisor: host.Kata})
	if err != nil || settings.HypervisorSocket != "" || settings.QEMU == "" || len(settings.Virtiofsd) == 0 {
		t.Errorf("Kata's own driver: %+v, %v", settings, err)
	}
	cfg.Virtiofsd = "/nowhere/virtiofsd"
	if _, err := shimSettings(t.Context(), cfg, host.Route{Hypervisor: host.Kata}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Kata's own driver without virtiofsd: %v", err)
	}
	if _, err := shimSettings(t.Context(), cfg, host.Route{Hypervisor: host.Builtin}); err != nil {
		t.Errorf("builtin without virtiofsd: %v", err)
	}
	cfg.QEMU = "/nowhere/qemu"
	if _, err := shimSettings(t.Context(), cfg, host.Route{Hypervisor: host.Builtin}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("builtin without QEMU: %v", err)
	}
	cfg.KataConfig, cfg.QEMU = filepath.Join(t.TempDir(), "kata.toml"), ""
	writeFile := func(text string) {
		t.Helper()
		if err := os.WriteFile(cfg.KataConfig, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	writeFile("[hypervisor.remote]\nremote_hypervisor_socket = \"" + serviceSocket(cfg) + "\"\n")
	settings, err = shimSettings(t.Context(), cfg, host.Route{Hypervisor: host.Kata})
	if err != nil || settings.Config != cfg.KataConfig || !settings.UsesDisks() || settings.Portal == "" {
		t.Errorf("custom configuration with msbd's service: %+v, %v", settings, err)
	}
	cfg.QEMU = "/nowhere/qemu"
	writeFile("[hypervisor.remote]\nremote_hypervisor_socket = \"/run/other.sock\"\n")
	settings, err = shimSettings(t.Context(), cfg, host.Route{Hypervisor: host.Builtin})
	if err != nil || settings.Config != cfg.KataConfig || settings.HypervisorSocket != "" || settings.QEMU != "" || settings.Portal == "" {
		t.Errorf("custom configuration: %+v, %v", settings, err)
	}
}
