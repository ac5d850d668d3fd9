package microvm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"text/template"
)

// kataOptions is the type URL under which Kata's shim accepts its options.
const kataOptions = "io.containerd.kata.v2.options"

// kataConfig is the configuration of Kata's shim on the remote-hypervisor route. The shim reads it
// at each start of a sandbox.
var kataConfig = template.Must(template.New("kata").Parse(`# Written by msbd at each start; changes are lost.
[hypervisor.remote]
remote_hypervisor_socket = "{{.HypervisorSocket}}"
remote_hypervisor_timeout = 60
enable_annotations = ["machine_type", "default_memory", "default_vcpus", "image"]
default_bridges = 1
disable_guest_selinux = true

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
`))

// writeKataConfig writes the shim's configuration and returns its path.
func writeKataConfig(dir, hypervisorSocket string) (string, error) {
	var b bytes.Buffer
	if err := kataConfig.Execute(&b, struct{ HypervisorSocket string }{hypervisorSocket}); err != nil {
		return "", err
	}
	path := filepath.Join(dir, "kata.toml")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		return "", fmt.Errorf("write the shim's configuration: %w", err)
	}
	return path, nil
}

var versionRE = regexp.MustCompile(`version: ([^,\s]+)`)

// KataVersion asks the shim for its version, as built.
func (r *Runtime) KataVersion(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, r.Shim, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask %s for its version: %w", r.Shim, err)
	}
	m := versionRE.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("ask %s for its version: it says %q", r.Shim, out)
	}
	return string(m[1]), nil
}
