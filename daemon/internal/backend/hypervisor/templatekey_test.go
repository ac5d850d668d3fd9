package hypervisor

import (
	"cmp"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A VM is a clone only of a template with the same programs, image and size, as they are now.
func TestTemplateKey(t *testing.T) {
	cfg := newConfig(t)
	dir := filepath.Dir(cfg.Dir)
	cfg.Accelerator = "kvm" // with emulation, a VM has one processor
	programs := map[string]*string{"qemu": &cfg.QEMU, "kernel": &cfg.Kernel, "initrd": &cfg.Initrd}
	for name, path := range programs {
		*path = filepath.Join(dir, name)
		writeFile(t, *path, name)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	replace := func(path string) { // with the same content, as a package manager does
		data, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path+".new", data, 0o600)
		}
		if err := errors.Join(err, os.Rename(path+".new", path)); err != nil {
			t.Fatal(err)
		}
	}
	spec := testSpec(cfg, "one")
	spec.Container.Linux = &specs.Linux{CgroupsPath: "/one"}
	keyOf := func(spec Spec) string {
		t.Helper()
		key, _, err := s.templateKey(spec)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	key := keyOf(spec)
	equal := spec
	equal.ID, equal.Disks = "two", Disks{Image: filepath.Join(dir, "link"), Upper: filepath.Join(dir, "another")}
	equal.Container = &specs.Spec{Hostname: "two", Annotations: map[string]string{"a": "b"}, Linux: &specs.Linux{CgroupsPath: "/two"}}
	writeFile(t, equal.Disks.Upper, strings.Repeat("y", 4096))
	if err := os.Link(spec.Disks.Image, equal.Disks.Image); err != nil {
		t.Fatal(err)
	}
	if keyOf(equal) != key {
		t.Error("the keys of two sandboxes of one kind differ")
	}
	keys := map[string]string{key: "the first"}
	differs := func(what string, spec Spec) {
		t.Helper()
		key := keyOf(spec)
		if other := keys[key]; other != "" {
			t.Errorf("with another %s, the key is that of %s", what, other)
		}
		keys[key] = what
	}
	for what, change := range map[string]func(*Spec){
		"number of processors": func(s *Spec) { s.VCPUs++ },
		"memory":               func(s *Spec) { s.MemoryMiB++ },
		"image":                func(s *Spec) { s.Image = "another" },
		"user":                 func(s *Spec) { s.Container = &specs.Spec{Process: &specs.Process{User: specs.User{UID: 1}}} },
		"size of the disk":     func(s *Spec) { s.Disks.Upper = cfg.Kernel },
	} {
		changed := spec
		change(&changed)
		differs(what, changed)
	}
	for what, path := range programs {
		replace(*path)
		differs(what, spec)
	}
	replace(spec.Disks.Image) // as a disk that is built again
	differs("disk of the image", spec)
}

// After a restart of the host, which has emptied the run directory, msbd removes the templates from before.
func TestTemplatesAfterReboot(t *testing.T) {
	cfg := newConfig(t)
	const variable = "MSB_TEST_TEMPLATES"
	restarted := os.Getenv(variable) != ""
	cfg.TemplateDir, cfg.MaxTemplates = cmp.Or(os.Getenv(variable), filepath.Join(filepath.Dir(cfg.Dir), "templates")), 1
	log := &safeBuffer{}
	cfg.Log = slog.New(slog.NewTextHandler(log, nil))
	if restarted { // this is the process below
		id := filepath.Join(filepath.Dir(cfg.Dir), "boot_id")
		writeFile(t, id, "0d53e9b6-8f4a-4d8c-b6a3-2f1f4e6a9c11\n")
		if err := unix.Mount(id, "/proc/sys/kernel/random/boot_id", "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	spec := testSpec(cfg, "one")
	key, host, err := s.templateKey(spec)
	if err != nil {
		t.Fatal(err)
	}
	if restarted {
		entries, err := os.ReadDir(cfg.TemplateDir)
		if err != nil || len(entries) != 0 || len(s.templates.known) != 0 || !strings.Contains(log.String(), "before the host's last start") {
			t.Errorf("after the restart of the host: %v, %v, %v, log %s", entries, err, s.templates.known, log)
		}
		if _, why := s.templates.find(t.Context(), key); why != "there is no template yet" {
			t.Error(why)
		}
		return
	}
	place, err := s.templates.reserve(templateMeta{Key: key, Host: host, Built: time.Now()})
	if err == nil {
		err = s.storeTemplate(t.Context(), spec, place, makeTemplate(t, key))
	}
	if err != nil {
		t.Fatal(err)
	}
	if s, err = New(cfg); err != nil || len(s.templates.known) != 1 { // a restart of msbd
		t.Fatalf("after a restart of msbd: %v, %s", err, log)
	}
	reboot := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$")
	reboot.Env = append(os.Environ(), variable+"="+cfg.TemplateDir)
	reboot.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS} // the other boot id is only for it
	if out, err := reboot.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
