package hypervisor

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/portalclient"
)

// makeDisks makes disks for VM id: an image with empty directories, and an empty disk.
func makeDisks(t *testing.T, cfg Config, id string) Disks {
	t.Helper()
	dir := filepath.Dir(cfg.Dir)
	root := filepath.Join(dir, "root")
	disks := Disks{Image: filepath.Join(dir, "image.erofs"), Upper: filepath.Join(dir, id+".ext4")}
	commands := [][]string{{"/sbin/mkfs.ext4", "-q", "-O", "^has_journal", disks.Upper, "64M"}}
	if missing(disks.Image) {
		for _, name := range []string{"etc", "tmp"} {
			if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		commands = append(commands, []string{"mkfs.erofs", "--quiet", disks.Image, root})
	}
	for _, args := range commands {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	return disks
}

// diskSpec returns the description of VM id, whose container runs the portal.
func diskSpec(t *testing.T, cfg Config, id string) Spec {
	t.Helper()
	spec := testSpec(cfg, id)
	spec.Disks = makeDisks(t, cfg, id)
	spec.Image = "image"
	spec.Container = &specs.Spec{
		Version:  "1.1.0",
		Hostname: "host-" + id[len(id)-4:],
		Root:     &specs.Root{Path: "rootfs"},
		Process:  &specs.Process{Args: []string{"/.msb-portal", "serve"}, Cwd: "/", Env: []string{"PATH=/bin"}},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
			{Destination: "/.msb-portal", Type: "msb-guest", Source: "/msb-portal", Options: []string{"ro"}},
		},
		Annotations: map[string]string{"msb.root": "disks", "msb.test": id},
		Linux:       &specs.Linux{CgroupsPath: "/msb/" + id, Resources: &specs.LinuxResources{}, Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}}},
	}
	return spec
}

// startSandbox starts a VM with its shim, and its container, as Kata's shim does.
func (h *testService) startSandbox(t *testing.T, spec Spec) {
	t.Helper()
	if err := h.Start(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	s := startShim(t, h.cfg.Socket, spec.ID)
	path := s.mustCall(t, "CreateVM")
	s.mustCall(t, "StartVM")
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	t.Cleanup(func() { client.Close() })
	checkHealth(t, agent.NewHealthClient(client))
	guest := agent.NewAgentServiceClient(client)
	container, err := agentSpec(spec.Container)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	if _, err := guest.CreateSandbox(ctx, &agent.CreateSandboxRequest{SandboxId: spec.ID, Hostname: spec.Container.Hostname}); err != nil {
		t.Fatal(err)
	}
	if _, err := guest.CreateContainer(ctx, &agent.CreateContainerRequest{ContainerId: spec.ID, ExecId: spec.ID, OCI: container}); err != nil {
		t.Fatal(err)
	}
	if _, err := guest.StartContainer(ctx, &agent.StartContainerRequest{ContainerId: spec.ID}); err != nil {
		t.Fatal(err)
	}
	// The container has the id of the sandbox, and runs.
	if _, err := guest.StatsContainer(ctx, &agent.StatsContainerRequest{ContainerId: spec.ID}); err != nil {
		t.Fatal(err)
	}
	resp, err := guest.GetGuestDetails(ctx, &agent.GuestDetailsRequest{})
	if err != nil {
		t.Fatalf("%v, %v", resp, err)
	}
}

// A VM is a clone of a template that was built for another one, also after a restart of msbd. If the template cannot be
// restored, the VM boots, and the template is removed.
func TestTemplate(t *testing.T) {
	cfg := newConfig(t)
	cfg.TemplateDir, cfg.MaxTemplates = filepath.Join(filepath.Dir(cfg.Dir), "templates"), 2
	cfg.DiskMiBPerSecond = 200
	h, _ := startService(t, cfg)
	id := newVM(t, cfg)
	build := diskSpec(t, cfg, id)
	if built, err := h.TemplateBuilt(build); err != nil || !built.IsZero() {
		t.Fatalf("there is a template of %v, %v", built, err)
	}
	start := time.Now()
	var rehearsed []string
	err := h.BuildTemplate(t.Context(), build, func(ctx context.Context, conn io.ReadWriteCloser, program string) error {
		rehearsed = append(rehearsed, program)
		return rehearse(ctx, conn, program)
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, h.log)
	}
	if len(rehearsed) != 1 || rehearsed[0] != build.Container.Process.Args[0] {
		t.Errorf("rehearsed with %q", rehearsed)
	}
	t.Logf("built in %v", time.Since(start))
	if err := h.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if !h.isRemoved(t, id) {
		t.Error("the VM of the template was not removed completely")
	}
	for _, restarted := range []bool{false, true} {
		if restarted {
			h.stop()
			h, _ = startService(t, cfg)
			waitUntil(t, "the template is loaded", func() bool {
				built, err := h.TemplateBuilt(build)
				return err == nil && !built.IsZero()
			})
		}
		for range 2 {
			id := newVM(t, cfg)
			start := time.Now()
			h.startSandbox(t, diskSpec(t, cfg, id))
			t.Logf("restored in %v", time.Since(start))
			if why := h.Cold(id); why != "" {
				t.Errorf("the VM is no clone: %s\n%s", why, h.log)
			}
			h.checkDrives(t, id, driveLimits{Group: "disks", BPS: 200 * mib, BPSMax: 400 * mib, BPSMaxLength: 10})
		}
	}
	if log := h.log.String(); log != "" {
		t.Errorf("log: %s", log)
	}

	// A state that QEMU cannot read.
	broken, err := newMemFile(rawState, 1<<16)
	if err != nil {
		t.Fatal(err)
	}
	h.templates.known[0].state = broken
	for i := range maxTemplateFailures {
		id := newVM(t, cfg)
		h.startSandbox(t, diskSpec(t, cfg, id))
		if why := h.Cold(id); !strings.Contains(why, "could not be restored") {
			t.Errorf("the VM of the template that cannot be restored: %q\n%s", why, h.log)
		}
		built, err := h.TemplateBuilt(build)
		if removed := built.IsZero(); removed != (i+1 == maxTemplateFailures) || err != nil {
			t.Errorf("after %d failures the template is removed: %v, %v", i+1, removed, err)
		}
	}
	if entries, err := os.ReadDir(cfg.TemplateDir); err != nil || len(entries) != 0 {
		t.Errorf("files of templates: %v, %v", entries, err)
	}
}

// rehearse makes a call of the portal.
func rehearse(ctx context.Context, conn io.ReadWriteCloser, _ string) error {
	portal, err := portalclient.New(ctx, conn, nil)
	if err != nil {
		return err
	}
	return portal.Close()
}

// The id of a VM whose template cannot be built is free again, and nothing remains of it.
func TestTemplateBuildFails(t *testing.T) {
	cfg := newConfig(t)
	cfg.TemplateDir, cfg.MaxTemplates = filepath.Join(filepath.Dir(cfg.Dir), "templates"), 2
	h, _ := startService(t, cfg)
	id := newVM(t, cfg)
	spec := diskSpec(t, cfg, id)
	spec.Container.Process.Cwd = "/missing\x00"
	wantError(t, h.BuildTemplate(t.Context(), spec, rehearse), "build a template", "start the container in the guest")
	if err := h.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if !h.isRemoved(t, id) {
		t.Error("the VM was not removed completely")
	}
	if entries, err := os.ReadDir(cfg.TemplateDir); err != nil || len(entries) != 0 {
		t.Errorf("files of templates: %v, %v", entries, err)
	}
}

// A template that cannot be stored, because the disk is full or what it depends on was changed during its build, leaves nothing. The
// VM then boots.
func TestTemplateThatIsNotStored(t *testing.T) {
	for name, test := range map[string]struct {
		prepare func(t *testing.T, cfg Config)
		want    string
	}{
		"full disk": {func(t *testing.T, cfg Config) {
			if err := unix.Mount("tmpfs", cfg.TemplateDir, "tmpfs", 0, "size=128k"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(cfg.TemplateDir, 0); err != nil {
					t.Error(err)
				}
			})
		}, "no space left on device"},
		"changed image": {func(t *testing.T, cfg Config) { writeFile(t, imagePath(cfg), "another") }, "has changed during the build"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := newConfig(t)
			cfg.TemplateDir, cfg.MaxTemplates = filepath.Join(filepath.Dir(cfg.Dir), "templates"), 1
			s, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			spec := testSpec(cfg, "one")
			key, host, err := s.templateKey(spec)
			if err != nil {
				t.Fatal(err)
			}
			place, err := s.templates.reserve(templateMeta{Key: key, Host: host, Built: time.Now()})
			if err != nil {
				t.Fatal(err)
			}
			made := makeTemplate(t, key)
			defer made.close()
			test.prepare(t, cfg)
			wantError(t, s.storeTemplate(t.Context(), spec, place, made), test.want)
			s.templates.release(place)
			if entries, err := os.ReadDir(cfg.TemplateDir); err != nil || len(entries) != 0 || len(s.templates.known) != 0 {
				t.Errorf("left: %v, %v, %v", entries, err, s.templates.known)
			}
			if found, why := s.templates.find(t.Context(), key); found != nil || why != "there is no template yet" {
				t.Errorf("the template is used: %v, %s", found, why)
			}
		})
	}
}

// The build of a template gets less processor time than sandboxes if the host is busy.
func TestTemplateBuildHasLowPriority(t *testing.T) {
	weightOf := func(name string, mem memory) int {
		id := fmt.Sprintf("test-%d-%s", os.Getpid(), name)
		t.Cleanup(func() {
			if err := removeCgroup(context.Background(), id); err != nil {
				t.Error(err)
			}
		})
		if _, err := newCgroup(state{ID: id, VCPUs: 1, MemoryMiB: 64}, "kvm", mem); err != nil {
			t.Fatal(err)
		}
		for _, dir := range cgroupDirs(id) {
			for _, file := range []string{"cpu.weight", "cpu.shares"} { // of cgroup v2 and v1
				if data, err := os.ReadFile(filepath.Join(dir, file)); err == nil {
					weight, err := strconv.Atoi(strings.TrimSpace(string(data)))
					if err != nil {
						t.Fatal(err)
					}
					return weight
				}
			}
		}
		t.Fatal("the cgroup has no weight")
		return 0
	}
	boot, clone := weightOf("boot", memory{}), weightOf("clone", memory{file: os.Stdin, state: os.Stdin})
	if build := weightOf("build", memory{file: os.Stdin}); build > boot/10 || clone != boot {
		t.Errorf("the weight of a build is %d, that of a boot %d, and that of a clone %d", build, boot, clone)
	}
}
