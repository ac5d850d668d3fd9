package kata

import (
	"path/filepath"
	"strconv"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

const (
	// cgroupParent is where Kata makes the sandboxes' cgroups.
	cgroupParent = "/msb"
	// portalPath is where the guest finds the portal's program.
	portalPath = "/.msb/portal"
	// minKataMemory, in MiB, is the least that Kata takes as a guest's default memory.
	minKataMemory = 256
)

// spec describes the sandbox's container: the image, with the portal as its idle main process.
// Whatever the user runs comes later, through the portal.
func (r *Runtime) spec(id string, cfg sandbox.Config, image containerd.Image) []oci.SpecOpts {
	// A type of our own passes through the shim; a bind may be copied into the guest at each start.
	portal := specs.Mount{Type: "msb-guest", Source: "/msb-portal", Destination: portalPath, Options: []string{"ro"}}
	if r.Settings.Config != "" { // and with it a guest that does not hold it
		portal.Type, portal.Source, portal.Options = "bind", r.Settings.Portal, []string{"bind", "ro"}
	}
	annotations, quota := r.sizing(cfg)
	// Whoever wrote the configuration: all processes of a sandbox are in its cgroup, and none makes a network.
	for name, value := range map[string]string{
		"sandbox_cgroup_only": "true", "disable_new_netns": "true", "internetworking_model": "none",
	} {
		annotations["io.katacontainers.config.runtime."+name] = value
	}
	opts := []oci.SpecOpts{
		oci.WithDefaultPathEnv,
		oci.WithImageConfig(image),
		oci.WithProcessArgs(portalPath, "serve"),
		oci.WithHostname("sandbox"),
		oci.WithMounts([]specs.Mount{portal}),
		oci.WithAnnotations(annotations),
		oci.WithMemoryLimit(uint64(cfg.MemoryMiB) << 20),
		oci.WithCgroup(filepath.Join(cgroupParent, id)),
	}
	if quota {
		const period = 100_000
		opts = append(opts, oci.WithCPUCFS(int64(cfg.CPUs)*period, period))
	}
	return opts
}

// sizing chooses what makes the guest have as many processors as the sandbox, and enough more memory. Kata adds the
// container's limits to defaults of its own. That of the processors is 1 and can be 0 only by an annotation; where they
// are added to a guest that runs already, not even so.
func (r *Runtime) sizing(cfg sandbox.Config) (annotations map[string]string, quota bool) {
	const cpus, memory = "io.katacontainers.config.hypervisor.default_vcpus", "io.katacontainers.config.hypervisor.default_memory"
	switch {
	case r.Settings.useService():
		return map[string]string{}, true // the hypervisor service adds what it needs
	case r.Settings.Config == "":
		// For the guest's kernel and agent, the least that Kata takes, and for what the kernel keeps of each page.
		return map[string]string{cpus: "0", memory: strconv.Itoa(minKataMemory + cfg.MemoryMiB/32)}, true
	case !r.hostConfig.Enables("default_vcpus"):
		return map[string]string{}, true // one more than asked for
	case r.hostConfig.StaticResources:
		return map[string]string{cpus: "0"}, true
	}
	return map[string]string{cpus: strconv.Itoa(cfg.CPUs)}, false
}
