package kata

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"text/template"
	"time"

	"github.com/containerd/errdefs"
)

// kataOptions is the type URL under which Kata's shim accepts its options.
const kataOptions = "io.containerd.kata.v2.options"

// Settings say how the shims run microVMs. Paths are absolute.
type Settings struct {
	// Config is a configuration of the host's own, with its guest. When empty, msbd writes one of what follows.
	Config string
	// HypervisorSocket is where shims find msbd's hypervisor service. When empty, they drive QEMU themselves, with the
	// guest and programs below.
	HypervisorSocket string
	Kernel, Initrd   string
	QEMU             string
	Virtiofsd        []string // a command
	// Portal is the portal's program on the host, for a guest that does not hold it.
	Portal string
}

// useService reports whether the shims ask msbd's hypervisor service for sure. A configuration of the host's own may say so.
func (s Settings) useService() bool { return s.Config == "" && s.HypervisorSocket != "" }

// builtinConfig is for shims that ask msbd's hypervisor service. A shim reads it at the start of its sandbox.
var builtinConfig = template.Must(template.New("builtin").Parse(`# Written by msbd at each start; changes are lost.
[hypervisor.remote]
remote_hypervisor_socket = "{{.HypervisorSocket}}"
remote_hypervisor_timeout = 60
default_bridges = 1
disable_guest_selinux = true
` + commonConfig))

// qemuConfig is for shims that drive QEMU themselves. What is left out of it is off, or as good: no debug console,
// no templates, no annotation that changes the hypervisor but for its size.
var qemuConfig = template.Must(template.New("qemu").Parse(`# Written by msbd at each start; changes are lost.
[hypervisor.qemu]
path = "{{.QEMU}}"
kernel = "{{.Kernel}}"
initrd = "{{.Initrd}}"
machine_type = "q35"
firmware = "{{.Firmware}}"
cpu_features = "pmu=off"
seccompsandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
disable_nesting_checks = true
disable_vhost_net = true
disable_guest_selinux = true
entropy_source = "/dev/urandom"
enable_annotations = ["^default_vcpus$", "^default_memory$"]
default_bridges = 1

# Only a panic may speak. No device needs the 64 MiB of swiotlb that room for more memory brings along.
use_legacy_serial = true
kernel_params = "loglevel=1 panic=-1 random.trust_cpu=on swiotlb=noforce"

# Never the host's disk, below an image without layers (CVE-2026-24054).
disable_block_device_use = true
block_device_driver = "virtio-blk"
block_device_aio = "threads"

# Nobody writes beside the guest. The root file system is a mount below what is shared.
shared_fs = "virtio-fs"
virtio_fs_daemon = "{{index .Virtiofsd 0}}"
virtio_fs_cache = "always"
virtio_fs_extra_args = [{{range slice .Virtiofsd 1}}"{{.}}", {{end}}"--announce-submounts", "--sandbox=namespace", "--log-level=error"]
` + commonConfig))

const commonConfig = `
[agent.kata]
dial_timeout = 60

# No network yet: a sandbox has no interface, and nothing of one is left to remove.
[runtime]
internetworking_model = "none"
disable_new_netns = true
disable_guest_seccomp = true
sandbox_cgroup_only = true
static_sandbox_resource_mgmt = true
create_container_timeout = 60
`

// plainRE is what needs no quotes in TOML, and what QEMU takes literally.
var plainRE = regexp.MustCompile(`^[A-Za-z0-9/_.+~@=-]+$`)

// writeConfig writes the shims' configuration into dir and returns its path.
func (s Settings) writeConfig(dir string) (string, error) {
	tmpl, values := builtinConfig, struct {
		Settings
		Firmware string // empty: QEMU's default
	}{Settings: s}
	if s.HypervisorSocket == "" {
		tmpl, values.Firmware = qemuConfig, findFirmware(s.QEMU)
		for _, word := range append([]string{s.QEMU, s.Kernel, s.Initrd}, s.Virtiofsd...) {
			if !plainRE.MatchString(word) {
				return "", fmt.Errorf("use %q for microVMs: need a path of letters, digits and /_.+~@=-: %w", word, errdefs.ErrInvalidArgument)
			}
		}
		for what, path := range map[string]string{"kernel": s.Kernel, "initramfs": s.Initrd} {
			if _, err := os.Stat(path); err != nil {
				return "", fmt.Errorf("find the guest's %s: %w: build it with `make guest`, or install msbd again: %w", what, err, errdefs.ErrFailedPrecondition)
			}
		}
	}
	var b bytes.Buffer
	if err := tmpl.Execute(&b, values); err != nil {
		return "", err
	}
	path := filepath.Join(dir, "kata.toml")
	// A shim may be reading the one of an earlier daemon.
	err := os.WriteFile(path+".new", b.Bytes(), 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return "", fmt.Errorf("write the shim's configuration: %w", err)
	}
	return path, nil
}

// findFirmware finds qboot, which only starts kernels, and does that fast and silently.
func findFirmware(qemu string) string {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	dirs, _ := exec.CommandContext(ctx, qemu, "-L", "help").Output()
	for dir := range strings.Lines(string(dirs)) {
		path := filepath.Join(strings.TrimSpace(dir), "qboot.rom")
		if _, err := os.Stat(path); err == nil && plainRE.MatchString(path) {
			return path
		}
	}
	return ""
}
