package kata

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/kataconf"
)

var update = flag.Bool("update", false, "write the golden files")

// fakeHost returns Settings for fake programs and a fake guest in dir.
func fakeHost(t *testing.T) (k Settings, dir string) {
	t.Helper()
	dir = t.TempDir()
	k = Settings{
		Kernel: filepath.Join(dir, "vmlinux"), Initrd: filepath.Join(dir, "initrd.img"), QEMU: filepath.Join(dir, "qemu"),
		Virtiofsd: []string{filepath.Join(dir, "virtiofsd")},
	}
	for path, text := range map[string]string{
		k.Kernel: "kernel", k.Initrd: "initrd", filepath.Join(dir, "share", "qboot.rom"): "firmware",
		k.QEMU: "#!/bin/sh\n[ \"$*\" = '-L help' ] && echo /nowhere && echo " + dir + "/share\n",
	} {
		writeFile(t, path, text)
	}
	return k, dir
}

func TestConfig(t *testing.T) {
	qemu, qemuDir := fakeHost(t)
	c, cDir := fakeHost(t)
	c.Virtiofsd = []string{filepath.Join(cDir, "msb-virtiofsd"), "--daemon=" + filepath.Join(cDir, "virtiofsd")}
	for name, tt := range map[string]struct {
		settings Settings
		dir      string
	}{
		"builtin": {Settings{HypervisorSocket: "/run/msb/hypervisor.sock"}, t.TempDir()},
		"qemu":    {qemu, qemuDir},
		"qemu-c":  {c, cDir},
	} {
		path, err := tt.settings.writeConfig(tt.dir)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		got = bytes.ReplaceAll(got, []byte(tt.dir), []byte("/DIR"))
		golden := filepath.Join("testdata", "kata-"+name+".toml")
		if *update {
			if err := os.WriteFile(golden, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := os.ReadFile(golden); err != nil || string(got) != string(want) {
			t.Errorf("%s: got\n%s\nwant (go test -update)\n%s%v", name, got, want, err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
}

// Each setting that msbd writes is one that Kata's source code declares. Kata silently ignores unknown settings.
func TestConfigIsKatas(t *testing.T) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/kata-containers/kata-containers/src/runtime").Output()
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "pkg", "katautils", "config.go"))
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]map[string]bool{}
	for _, table := range []string{"hypervisor", "agent", "runtime"} {
		body := regexp.MustCompile(`(?s)\ntype ` + table + ` struct \{(.*?)\n\}`).FindSubmatch(source)
		if body == nil {
			t.Fatalf("Kata's source has no type %s", table)
		}
		known[table] = map[string]bool{}
		for _, m := range regexp.MustCompile("`toml:\"([a-z0-9_]+)\"`").FindAllSubmatch(body[1], -1) {
			known[table][string(m[1])] = true
		}
	}
	configs, err := filepath.Glob("testdata/kata-*.toml")
	if err != nil || len(configs) != 3 {
		t.Fatalf("configurations: %v, %v", configs, err)
	}
	for _, path := range configs {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var file struct {
			Hypervisor, Agent map[string]map[string]any
			Runtime           map[string]any
		}
		if err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(&file); err != nil {
			t.Fatal(err)
		}
		check := func(table string, values map[string]any) {
			if len(values) == 0 {
				t.Errorf("%s: [%s] is empty", path, table)
			}
			for key := range values {
				if !known[table][key] {
					t.Errorf("%s: [%s] %s is not a setting of Kata", path, table, key)
				}
			}
		}
		for _, values := range file.Hypervisor {
			check("hypervisor", values)
		}
		check("agent", file.Agent["kata"])
		check("runtime", file.Runtime)
		if len(file.Hypervisor) != 1 {
			t.Errorf("%s has %d hypervisors, want 1", path, len(file.Hypervisor))
		}
	}
}

func TestConfigRefuses(t *testing.T) {
	for name, change := range map[string]func(k *Settings, dir string){
		"no kernel":    func(k *Settings, dir string) { k.Kernel = filepath.Join(dir, "none") },
		"no initramfs": func(k *Settings, dir string) { k.Initrd = filepath.Join(dir, "none") },
		"quote":        func(k *Settings, dir string) { k.QEMU = dir + `/"` },
		"comma":        func(k *Settings, dir string) { k.Virtiofsd = append(k.Virtiofsd, "--daemon=/a,b") },
		"newline":      func(k *Settings, dir string) { k.QEMU = "/x\n" },
	} {
		k, dir := fakeHost(t)
		change(&k, dir)
		_, err := k.writeConfig(dir)
		if err == nil {
			t.Errorf("%s: no error", name)
		}
		if !missing(filepath.Join(dir, "kata.toml")) {
			t.Errorf("%s: a configuration was written", name)
		}
	}
}

func TestVersion(t *testing.T) {
	for output, want := range map[string]string{
		`Kata Containers containerd shim (Golang): id: "io.containerd.kata.v2", version: 3.20.0, commit: abc`:                                      "3.20.0",
		`Kata Containers containerd shim (Golang): id: "io.containerd.kata.v2", version: v0.0.0-20250828155603-754f07cff239, commit: 754f07cff239`: "v0.0.0-20250828155603-754f07cff239",
		`Kata Containers containerd shim (Rust): id: io.containerd.kata.v2, version: 3.31.0-rc0, commit: abc-dirty`:                                "3.31.0-rc0",
		`runc version 1.2`: "",
	} {
		shim := filepath.Join(t.TempDir(), "shim")
		writeFile(t, shim, "#!/bin/sh\n[ \"$*\" = --version ] && echo '"+output+"'\n")
		got, err := (&Runtime{Config: Config{Shim: shim}}).Version(t.Context())
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", output, got, err)
		}
	}
}

// The guest has as many processors as requested where Kata's configuration allows it.
func TestSizing(t *testing.T) {
	const cpus, memory = "io.katacontainers.config.hypervisor.default_vcpus", "io.katacontainers.config.hypervisor.default_memory"
	own := func(text string) Settings {
		path := filepath.Join(t.TempDir(), "kata.toml")
		writeFile(t, path, text)
		return Settings{Config: path}
	}
	const static = "[runtime]\nstatic_sandbox_resource_mgmt = true\n"
	tests := map[string]struct {
		settings     Settings
		cpus, memory string
		quota        bool
	}{
		"builtin":      {Settings{HypervisorSocket: "/run/x.sock"}, "", "", true},
		"kata":         {Settings{}, "0", "272", true},
		"stock":        {own("[hypervisor.qemu]\nenable_annotations = [\"kernel_params\"]\n"), "", "", true},
		"static":       {own("[hypervisor.qemu]\nenable_annotations = [\"default_vcpus\"]\n" + static), "0", "", true},
		"dynamic":      {own("[hypervisor.qemu]\nenable_annotations = [\"default_.*\"]\n"), "3", "", false},
		"only static":  {own("[hypervisor.qemu]\n" + static), "", "", true},
		"bad patterns": {own("[hypervisor.qemu]\nenable_annotations = [\"(\"]\n"), "", "", true},
	}
	for name, tt := range tests {
		r, _ := newTestRuntime(t)
		r.Settings = tt.settings
		if tt.settings.Config != "" {
			var err error
			if r.hostConfig, err = kataconf.Read(tt.settings.Config); err != nil {
				t.Fatal(err)
			}
		}
		annotations, quota := r.sizing(sandbox.Template{CPUs: 3, MemoryMiB: 512})
		if annotations[cpus] != tt.cpus || annotations[memory] != tt.memory || quota != tt.quota {
			t.Errorf("%s: %v, %v", name, annotations, quota)
		}
	}
}
