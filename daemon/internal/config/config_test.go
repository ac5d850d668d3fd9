package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
)

func source(values map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		v, ok := values[name]
		return v, ok
	}
}

func load(t *testing.T, file string, env, flags map[string]string) (Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "msbd.toml")
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(path, source(env), source(flags))
}

func TestDefaultIsValid(t *testing.T) {
	got, err := load(t, "", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), got); diff != "" {
		t.Error(diff)
	}
}

func TestSourcesGoOverEachOther(t *testing.T) {
	got, err := load(t, `
		state_dir = "/file"
		run_dir = "/file"
		qemu = "/file"
		max_cpus = 4
		dev = true
		max_run_time = "30s"
		listen = "127.0.0.1:1"
	`,
		map[string]string{"MSBD_RUN_DIR": "/env", "MSBD_QEMU": "/env", "MSBD_MAX_CPUS": "5", "MSBD_PORT": "2"},
		map[string]string{"qemu": "/flag", "host": "::1", "dev": "false"})
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.StateDir, want.RunDir, want.QEMU = "/file", "/env", "/flag"
	want.MaxCPUs, want.MaxRunTime, want.Listen = 5, 30*time.Second, "[::1]:2"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Each setting has to be reachable from each source, under the name that its help promises.
func TestEverySettingInEverySource(t *testing.T) {
	sample := map[string]string{
		"listen": "127.0.0.1:9", "host": "::1", "port": "9", "accelerator": "tcg", "log-level": "warn", "log-format": "json",
		"max-run-time": "7s", "max-cpus": "7", "default-cpus": "2", "default-memory-mib": "600", "max-memory-mib": "700",
		"default-image": "other",
	}
	for _, s := range Settings {
		t.Run(s.Name, func(t *testing.T) {
			value, ok := sample[s.Name]
			if !ok {
				value = "/sample"
			}
			if s.Bool {
				value = "true"
			}
			var all []Config
			for _, src := range []struct {
				file       string
				env, flags map[string]string
			}{
				{file: strings.ReplaceAll(s.Name, "-", "_") + " = " + `"` + value + `"`},
				{env: map[string]string{"MSBD_" + strings.ToUpper(strings.ReplaceAll(s.Name, "-", "_")): value}},
				{flags: map[string]string{s.Name: value}},
			} {
				c, err := load(t, src.file, src.env, src.flags)
				if err != nil {
					t.Fatal(err)
				}
				if c == Default() {
					t.Errorf("%+v changes nothing", src)
				}
				all = append(all, c)
			}
			if all[0] != all[1] || all[1] != all[2] {
				t.Errorf("sources differ: %+v", all)
			}
		})
	}
}

func TestAllProblemsAtOnce(t *testing.T) {
	_, err := load(t, "colour = 1\nmax_cpus = []\nstate_dir = \"relative\"",
		map[string]string{"MSBD_DEFAULT_CPUS": "many", "MSBD_DEV": "maybe"},
		map[string]string{"max-run-time": "5", "accelerator": "xen", "port": "99999"})
	if !errdefs.IsInvalidArgument(err) {
		t.Fatalf("got %v", err)
	}
	for _, want := range []string{`"colour"`, "max_cpus", "relative", "MSBD_DEFAULT_CPUS", "MSBD_DEV", "max-run-time", "xen", "99999"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%s is not mentioned in:\n%v", want, err)
		}
	}
}

func TestUnreadableFile(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing.toml")
	if _, err := Load(missing, source(nil), source(nil)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), missing) {
		t.Errorf("missing file: %v", err)
	}
	if _, err := load(t, "a = 1\nb ==", nil, nil); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), ":2:") {
		t.Errorf("bad TOML: %v, want it with the line", err)
	}
}

func TestListen(t *testing.T) {
	tests := []struct {
		listen     string
		dev, proxy bool
		ok         bool
	}{
		{"127.0.0.1:5555", false, false, true},
		{"127.0.0.1:5555", true, false, true},
		{"[::1]:0", true, false, true},
		{"localhost:80", true, false, true},
		{"[::ffff:127.0.0.1]:80", true, false, true},
		{"0.0.0.0:5555", false, false, false},
		{":5555", false, false, false},
		{"[::]:5555", false, true, true},
		{"0.0.0.0:5555", true, true, false},
		{"example.org:5555", true, true, false},
		{"127.0.0.1", false, false, false},
		{"127.0.0.1:-1", false, false, false},
	}
	for _, tt := range tests {
		flags := map[string]string{"listen": tt.listen}
		if tt.dev {
			flags["dev"] = "true"
		}
		if tt.proxy {
			flags["insecure-behind-proxy"] = "true"
		}
		if _, err := load(t, "", nil, flags); (err == nil) != tt.ok {
			t.Errorf("listen %s dev %t proxy %t: %v", tt.listen, tt.dev, tt.proxy, err)
		}
	}
}
