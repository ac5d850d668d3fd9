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

// kataOptions is the type URL of the options that Kata's shim accepts.
const kataOptions = "io.containerd.kata.v2.options"

// Settings determine how the shims run microVMs. All paths are absolute.
type Settings struct {
	// Config is the path of the host's Kata configuration, which also names the guest. If empty, msbd writes a
	// configuration from the fields below.
	Config string
	// HypervisorSocket is the socket of msbd's hypervisor service. If empty, the shims run QEMU themselves, with the
	// guest and programs below. With Config, it is set if the configuration names the service.
	HypervisorSocket string
	Kernel, Initrd   string
	QEMU             string
	Virtiofsd        []string // a command
	// Programs are the paths of the executables of QEMU and virtiofsd. They may be unknown with Config.
	Programs []string
	// Portal is the path of the portal program on this host. It is used with Config, whose guest does not contain the
	// portal.
	Portal string
}

// UsesDisks reports whether sandboxes run on msbd's hypervisor service, which gives each of them disks. Kata's own driver
// shares a directory of the host instead.
func (s Settings) UsesDisks() bool { return s.HypervisorSocket != "" }

// builtinConfig is the configuration of shims that use msbd's hypervisor service. A shim reads it when its sandbox
// starts.
var builtinConfig = template.Must(template.New("builtin").Parse(`# Written by msbd at each start; changes are lost.
[hypervisor.remote]
remote_hypervisor_socket = "{{.HypervisorSocket}}"
remote_hypervisor_timeout = 110
default_bridges = 1
disable_guest_selinux = true
` + commonConfig))

// qemuConfig is the configuration of shims that run QEMU themselves. Settings that are not in it are off by default or
// not needed: there is no debug console and there are no VM templates. No annotations can change the hypervisor, except
// for those that set its size.
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

# The kernel prints only panics. It must not reserve 64 MiB for swiotlb, which it would do because the VM has room for more
# memory. No device needs swiotlb.
use_legacy_serial = true
kernel_params = "loglevel=1 panic=-1 random.trust_cpu=on swiotlb=noforce"

# Otherwise an image without layers could get the host's disk (CVE-2026-24054).
disable_block_device_use = true
block_device_driver = "virtio-blk"
block_device_aio = "threads"

# Only the guest writes to the shared directory, so its cache is always valid. The root file system is a mount below that
# directory.
shared_fs = "virtio-fs"
virtio_fs_daemon = "{{index .Virtiofsd 0}}"
virtio_fs_cache = "always"
virtio_fs_extra_args = [{{range slice .Virtiofsd 1}}"{{.}}", {{end}}"--announce-submounts", "--sandbox=namespace", "--log-level=error"]
` + commonConfig))

const commonConfig = `
# A guest's boot has a little less time than msbd gives the whole start, so that the error says what failed.
[agent.kata]
dial_timeout = 110

# Sandboxes have no network yet, so there is no interface to create or to remove.
[runtime]
internetworking_model = "none"
disable_new_netns = true
disable_guest_seccomp = true
sandbox_cgroup_only = true
static_sandbox_resource_mgmt = true
create_container_timeout = 60
`

// plainRE matches words that need no escaping in TOML and that QEMU takes literally.
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
				return "", fmt.Errorf("invalid path %q for microVMs: it must consist of letters, digits and /_.+~@=-: %w", word, errdefs.ErrInvalidArgument)
			}
		}
		for name, path := range map[string]string{"kernel": s.Kernel, "initramfs": s.Initrd} {
			if _, err := os.Stat(path); err != nil {
				return "", fmt.Errorf("find the guest's %s: %w; build it with `make guest` or reinstall msbd: %w", name, err, errdefs.ErrFailedPrecondition)
			}
		}
	}
	var b bytes.Buffer
	if err := tmpl.Execute(&b, values); err != nil {
		return "", err
	}
	path := filepath.Join(dir, "kata.toml")
	// Replace the file atomically, because a shim may be reading the previous one.
	err := os.WriteFile(path+".new", b.Bytes(), 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return "", fmt.Errorf("write the shim's configuration: %w", err)
	}
	return path, nil
}

// findFirmware returns the path of QEMU's firmware qboot, which only starts kernels and is fast and silent. It returns
// "" if there is none.
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
