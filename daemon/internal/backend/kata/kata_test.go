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

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

var update = flag.Bool("update", false, "write the golden files")

// fakeHost is a Kata with programs and a guest of the test's own.
func fakeHost(t *testing.T) (k Kata, dir string) {
	t.Helper()
	dir = t.TempDir()
	k = Kata{
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
		kata Kata
		dir  string
	}{
		"builtin": {Kata{HypervisorSocket: "/run/msb/hypervisor.sock"}, t.TempDir()},
		"qemu":    {qemu, qemuDir},
		"qemu-c":  {c, cDir},
	} {
		path, err := tt.kata.writeConfig(tt.dir)
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

// Kata ignores what it does not know: each of our settings must be one of its own, as its source spells it.
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
					t.Errorf("%s: [%s] %s is no setting of Kata's", path, table, key)
				}
			}
		}
		for _, values := range file.Hypervisor {
			check("hypervisor", values)
		}
		check("agent", file.Agent["kata"])
		check("runtime", file.Runtime)
		if len(file.Hypervisor) != 1 {
			t.Errorf("%s has %d hypervisors", path, len(file.Hypervisor))
		}
	}
}

func TestConfigRefuses(t *testing.T) {
	for what, change := range map[string]func(k *Kata, dir string){
		"no kernel":    func(k *Kata, dir string) { k.Kernel = filepath.Join(dir, "none") },
		"no initramfs": func(k *Kata, dir string) { k.Initrd = filepath.Join(dir, "none") },
		"quotes":       func(k *Kata, dir string) { k.QEMU = dir + `/"` },
		"a comma":      func(k *Kata, dir string) { k.Virtiofsd = append(k.Virtiofsd, "--daemon=/a,b") },
		"a new line":   func(k *Kata, dir string) { k.QEMU = "/x\n" },
	} {
		k, dir := fakeHost(t)
		change(&k, dir)
		_, err := k.writeConfig(dir)
		if err == nil {
			t.Errorf("%s is accepted", what)
		}
		if !missing(filepath.Join(dir, "kata.toml")) {
			t.Errorf("%s: a configuration was written", what)
		}
	}
}

func TestKataVersion(t *testing.T) {
	for says, want := range map[string]string{
		`Kata Containers containerd shim (Golang): id: "io.containerd.kata.v2", version: 3.20.0, commit: abc`:                                      "3.20.0",
		`Kata Containers containerd shim (Golang): id: "io.containerd.kata.v2", version: v0.0.0-20250828155603-754f07cff239, commit: 754f07cff239`: "v0.0.0-20250828155603-754f07cff239",
		`Kata Containers containerd shim (Rust): id: io.containerd.kata.v2, version: 3.31.0-rc0, commit: abc-dirty`:                                "3.31.0-rc0",
		`runc version 1.2`: "",
	} {
		shim := filepath.Join(t.TempDir(), "shim")
		writeFile(t, shim, "#!/bin/sh\n[ \"$*\" = --version ] && echo '"+says+"'\n")
		got, err := (&Runtime{Config: Config{Shim: shim}}).KataVersion(t.Context())
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", says, got, err)
		}
	}
}

func TestKataFile(t *testing.T) {
	const qemu = "[hypervisor.qemu]\npath = \"/usr/bin/qemu\"\n"
	tests := map[string]struct {
		text    string
		dropIns map[string]string
		err     string
	}{
		"stock":            {text: qemu + "enable_annotations = [\"enable_iommu\"]\n[agent.kata]\n[runtime]\nenable_pprof = false"},
		"Cloud Hypervisor": {text: "[hypervisor.clh]\n"},
		"remote":           {text: "[hypervisor.remote]\nremote_hypervisor_socket = \"/run/peerpod/hypervisor.sock\""},
		"drop-in":          {text: qemu, dropIns: map[string]string{"10-debug.toml": "[hypervisor.qemu]\nenable_debug = true\n"}},
		"no TOML":          {text: "[hypervisor", err: "kata.toml"},
		"no table":         {text: "[runtime]\n", err: "has 0"},
		"two tables":       {text: qemu + "[hypervisor.clh]\n", err: `has 2 ["clh" "qemu"]`},
		"two by a drop-in": {text: qemu, dropIns: map[string]string{"x": "[hypervisor.clh]\n"}, err: "has 2"},
		"a bad drop-in":    {text: qemu, dropIns: map[string]string{"x": "="}, err: "config.d/x"},
		"a wrong type":     {text: "[hypervisor.qemu]\nenable_annotations = 1\n", err: "kata.toml"},
	}
	for name, tt := range tests {
		dir := t.TempDir()
		path := filepath.Join(dir, "kata.toml")
		writeFile(t, path, tt.text)
		for file, text := range tt.dropIns {
			writeFile(t, filepath.Join(dir, "config.d", file), text)
		}
		_, err := readKataFile(path)
		if tt.err == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		wantError(t, err, "kata-config", tt.err)
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v is no %v", name, err, errdefs.ErrInvalidArgument)
		}
	}
	// config.d of a link is that of its target.
	dir, links := t.TempDir(), t.TempDir()
	writeFile(t, filepath.Join(dir, "kata.toml"), qemu)
	writeFile(t, filepath.Join(dir, "config.d", "x"), "[hypervisor.clh]\n")
	link := filepath.Join(links, "configuration.toml")
	if err := os.Symlink(filepath.Join(dir, "kata.toml"), link); err != nil {
		t.Fatal(err)
	}
	_, err := readKataFile(link)
	wantError(t, err, "has 2")

	_, err = readKataFile("/nowhere/kata.toml")
	wantError(t, err, "/nowhere/kata.toml")
}

// The guest has as many processors as asked for where Kata can be told so.
func TestSizing(t *testing.T) {
	const cpus, memory = "io.katacontainers.config.hypervisor.default_vcpus", "io.katacontainers.config.hypervisor.default_memory"
	own := func(text string) Kata {
		path := filepath.Join(t.TempDir(), "kata.toml")
		writeFile(t, path, text)
		return Kata{Config: path}
	}
	const static = "[runtime]\nstatic_sandbox_resource_mgmt = true\n"
	tests := map[string]struct {
		kata         Kata
		cpus, memory string
		quota        bool
	}{
		"builtin":      {Kata{HypervisorSocket: "/run/x.sock"}, "", "", true},
		"kata":         {Kata{}, "0", "272", true},
		"stock":        {own("[hypervisor.qemu]\nenable_annotations = [\"kernel_params\"]\n"), "", "", true},
		"static":       {own("[hypervisor.qemu]\nenable_annotations = [\"default_vcpus\"]\n" + static), "0", "", true},
		"dynamic":      {own("[hypervisor.clh]\nenable_annotations = [\"default_.*\"]\n"), "3", "", false},
		"only static":  {own("[hypervisor.qemu]\n" + static), "", "", true},
		"bad patterns": {own("[hypervisor.qemu]\nenable_annotations = [\"(\"]\n"), "", "", true},
	}
	for name, tt := range tests {
		r, _ := testRuntime(t)
		r.Kata = tt.kata
		if tt.kata.Config != "" {
			var err error
			if r.kataFile, err = readKataFile(tt.kata.Config); err != nil {
				t.Fatal(err)
			}
		}
		annotations, quota := r.sizing(sandbox.Config{CPUs: 3, MemoryMiB: 512})
		if annotations[cpus] != tt.cpus || annotations[memory] != tt.memory || quota != tt.quota {
			t.Errorf("%s: %v, %v", name, annotations, quota)
		}
	}
}
