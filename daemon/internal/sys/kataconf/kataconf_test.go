package kataconf

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

const qemu = "[hypervisor.qemu]\npath = \"/usr/bin/qemu\"\n"

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	for _, part := range append(parts, "kata-config") {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("the error does not contain %q: %v", part, err)
		}
	}
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("got %v, want invalid argument", err)
	}
}

func TestRead(t *testing.T) {
	tests := map[string]struct {
		text    string
		dropIns map[string]string
		driver  string
		err     string
	}{
		"stock":             {text: qemu + "enable_annotations = [\"enable_iommu\"]\n[agent.kata]\n[runtime]\nenable_pprof = false", driver: "qemu"},
		"another driver":    {text: "[hypervisor.clh]\n", driver: "clh"},
		"remote":            {text: "[hypervisor.remote]\nremote_hypervisor_socket = \"/run/peerpod/hypervisor.sock\"", driver: "remote"},
		"drop-in":           {text: qemu, dropIns: map[string]string{"10-debug.toml": "[hypervisor.qemu]\nenable_debug = true\n"}, driver: "qemu"},
		"not TOML":          {text: "[hypervisor", err: "kata.toml"},
		"empty":             {err: "has 0"},
		"no table":          {text: "[runtime]\n", err: "has 0"},
		"two tables":        {text: qemu + "[hypervisor.clh]\n", err: `has 2 ["clh" "qemu"]`},
		"two by a drop-in":  {text: qemu, dropIns: map[string]string{"x": "[hypervisor.clh]\n"}, err: "has 2"},
		"a bad drop-in":     {text: qemu, dropIns: map[string]string{"x": "="}, err: "config.d/x"},
		"a wrong type":      {text: "[hypervisor.qemu]\nenable_annotations = 1\n", err: "kata.toml"},
		"no table of names": {text: "hypervisor = 3\n", err: "kata.toml"},
	}
	for name, tt := range tests {
		path := filepath.Join(t.TempDir(), "kata.toml")
		writeFile(t, path, tt.text)
		for file, text := range tt.dropIns {
			writeFile(t, filepath.Join(filepath.Dir(path), "config.d", file), text)
		}
		c, err := Read(path)
		if tt.err != "" {
			wantError(t, err, tt.err)
		} else if err != nil || c.Driver != tt.driver {
			t.Errorf("%s: %+v, %v, want driver %q", name, c, err, tt.driver)
		}
	}
	_, err := Read("/nowhere/kata.toml")
	wantError(t, err, "/nowhere/kata.toml")
}

func TestReadSymbolicLink(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "kata.toml"), qemu)
	writeFile(t, filepath.Join(dir, "config.d", "x"), "[hypervisor.clh]\n")
	link := filepath.Join(t.TempDir(), "configuration.toml")
	if err := os.Symlink(filepath.Join(dir, "kata.toml"), link); err != nil {
		t.Fatal(err)
	}
	_, err := Read(link)
	wantError(t, err, "has 2")
}

// A drop-in changes the settings that it has, but not the other settings of the same table.
func TestDropInsOverride(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kata.toml")
	writeFile(t, path, qemu+"enable_annotations = [\"default_.*\"]\n[runtime]\nstatic_sandbox_resource_mgmt = true\n")
	writeFile(t, filepath.Join(filepath.Dir(path), "config.d", "1"), "[hypervisor.qemu]\npath = \"/opt/qemu\"\n[runtime]\nstatic_sandbox_resource_mgmt = false\n")
	c, err := Read(path)
	if err != nil || c.Driver != "qemu" || c.StaticResources || !c.AllowsAnnotation("default_vcpus") {
		t.Errorf("%+v, %v", c, err)
	}
	writeFile(t, filepath.Join(filepath.Dir(path), "config.d", "2"), "[hypervisor.qemu]\nenable_annotations = []\n")
	if c, err := Read(path); err != nil || c.AllowsAnnotation("default_vcpus") {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestEnables(t *testing.T) {
	c := Config{annotations: []string{"(", "^kernel$", "default_.*"}}
	for annotation, want := range map[string]bool{"default_vcpus": true, "kernel": true, "kernel_params": false, "(": false} {
		if got := c.AllowsAnnotation(annotation); got != want {
			t.Errorf("Enables(%q) = %t", annotation, got)
		}
	}
}
