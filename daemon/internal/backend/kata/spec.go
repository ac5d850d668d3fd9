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
	// cgroupParent is the cgroup in which Kata creates the sandboxes' cgroups.
	cgroupParent = "/msb"
	// portalPath is the path of the portal program in the sandbox.
	portalPath = "/.msb/portal"
	// minKataMemory is the smallest default memory of a guest that Kata accepts, in MiB.
	minKataMemory = 256
)

// spec returns the spec of the sandbox's container: the image, with the portal as its idle main process. The portal
// later starts the user's code and commands.
func (r *Runtime) spec(id string, cfg sandbox.Config, image containerd.Image) []oci.SpecOpts {
	// The shim passes a mount of an unknown type to the guest, whose agent knows this one. For a bind mount, the shim
	// may instead copy the file into the guest at each start.
	portal := specs.Mount{Type: "msb-guest", Source: "/msb-portal", Destination: portalPath, Options: []string{"ro"}}
	if r.Settings.Config != "" { // the guest of the host's Kata does not contain the portal
		portal.Type, portal.Source, portal.Options = "bind", r.Settings.Portal, []string{"bind", "ro"}
	}
	annotations, quota := r.sizing(cfg)
	// All processes of a sandbox must be in its cgroup, and Kata must create no network. Set this for every
	// configuration, because the host's configuration may differ.
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

// sizing returns the annotations for the guest's size, and whether to set a CPU quota. They give the guest as many
// processors as the sandbox, and enough additional memory for the guest's kernel and agent. Kata adds the container's
// limits to its defaults. The default number of processors is 1. Only an annotation can set it to 0, and it cannot be 0
// if Kata adds processors to a running guest.
func (r *Runtime) sizing(cfg sandbox.Config) (annotations map[string]string, quota bool) {
	const cpus, memory = "io.katacontainers.config.hypervisor.default_vcpus", "io.katacontainers.config.hypervisor.default_memory"
	switch {
	case r.Settings.useService():
		return map[string]string{}, true // the hypervisor service adds the memory for the kernel and agent
	case r.Settings.Config == "":
		// minKataMemory is enough for the guest's kernel and agent. The kernel also uses some memory to manage each
		// page.
		return map[string]string{cpus: "0", memory: strconv.Itoa(minKataMemory + cfg.MemoryMiB/32)}, true
	case !r.hostConfig.AllowsAnnotation("default_vcpus"):
		return map[string]string{}, true // the guest gets one processor more than requested
	case r.hostConfig.StaticResources:
		return map[string]string{cpus: "0"}, true
	}
	return map[string]string{cpus: strconv.Itoa(cfg.CPUs)}, false
}
