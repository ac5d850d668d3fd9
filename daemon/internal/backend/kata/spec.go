package kata

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"strconv"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/containers"
	"github.com/containerd/containerd/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

const (
	// cgroupParent is the cgroup in which Kata creates the sandboxes' cgroups.
	cgroupParent = "/msb"
	// portalPath is the path of the portal program in the sandbox. It is a mount point in the root directory, so that
	// root in the sandbox can neither rename nor replace it, nor a directory above it.
	portalPath = "/.msb-portal"
	// rootAnnotation tells the guest's agent where the container's root is. rootFromDisks means that it is on the
	// sandbox's disks.
	rootAnnotation = "msb.root"
	rootFromDisks  = "disks"
	// minKataMemory is the smallest default memory of a guest that Kata accepts, in MiB.
	minKataMemory = 256
)

// spec returns the spec of the sandbox's container: the image, with the portal as its idle main process. The portal
// later starts the user's code and commands.
func (r *Runtime) spec(id string, t sandbox.Template, hostname string, image containerd.Image) []oci.SpecOpts {
	// The shim passes a mount of an unknown type to the guest, whose agent knows this one. For a bind mount, the shim
	// may instead copy the file into the guest at each start.
	portal := specs.Mount{Type: "msb-guest", Source: "/msb-portal", Destination: portalPath, Options: []string{"ro"}}
	if r.Settings.Config != "" && !r.Settings.UsesDisks() { // the guest of the host's Kata does not contain the portal
		portal.Type, portal.Source, portal.Options = "bind", r.Settings.Portal, []string{"bind", "ro"}
	}
	annotations, quota := r.sizing(t)
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
		oci.WithHostname(cmp.Or(hostname, sandbox.DefaultHostname)),
		// With it, root in the sandbox could write packets with any address, also that of the host. Programs can use ping without it.
		oci.WithDroppedCapabilities([]string{"CAP_NET_RAW"}),
		oci.WithNewPrivileges, // otherwise sudo would not work; the microVM is the boundary
		withFileLimit,
		oci.WithoutMounts("/dev/shm"),
		oci.WithMounts([]specs.Mount{portal, sharedMemory(t)}),
		oci.WithAnnotations(annotations),
		oci.WithMemoryLimit(uint64(t.MemoryMiB) << 20),
		oci.WithCgroup(filepath.Join(cgroupParent, id)),
	}
	if quota {
		const period = 100_000
		opts = append(opts, oci.WithCPUCFS(int64(t.CPUs)*period, period))
	}
	return opts
}

// withFileLimit sets the limits of open files that the programs of a sandbox begin with. A program can raise its own to
// the hard limit. The soft limit is lower, because some programs allocate memory for each possible descriptor, or close
// all of them.
func withFileLimit(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
	s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1 << 16, Hard: 1 << 20}}
	return nil
}

// sharedMemory returns the mount of /dev/shm. It may take half of the sandbox's memory, like a tmpfs of a host. Kata's
// shim replaces a mount whose destination is exactly "/dev/shm" by one of 64 MiB, so this one ends in a slash.
func sharedMemory(t sandbox.Template) specs.Mount {
	return specs.Mount{
		Type: "tmpfs", Source: "shm", Destination: "/dev/shm/",
		Options: []string{"nosuid", "noexec", "nodev", "mode=1777", fmt.Sprintf("size=%dk", t.MemoryMiB<<10/2)},
	}
}

// sizing returns the annotations for the guest's size, and whether to set a CPU quota. They give the guest as many
// processors as the sandbox, and enough additional memory for the guest's kernel and agent. Kata adds the container's
// limits to its defaults. The default number of processors is 1. Only an annotation can set it to 0, and it cannot be 0
// if Kata adds processors to a running guest.
func (r *Runtime) sizing(t sandbox.Template) (annotations map[string]string, quota bool) {
	const cpus, memory = "io.katacontainers.config.hypervisor.default_vcpus", "io.katacontainers.config.hypervisor.default_memory"
	switch {
	case r.Settings.UsesDisks():
		return map[string]string{}, true // the hypervisor service adds the memory for the kernel and agent
	case r.Settings.Config == "":
		// minKataMemory is enough for the guest's kernel and agent. The kernel also uses some memory to manage each
		// page.
		return map[string]string{cpus: "0", memory: strconv.Itoa(minKataMemory + t.MemoryMiB/32)}, true
	case !r.hostConfig.AllowsAnnotation("default_vcpus"):
		return map[string]string{}, true // the guest gets one processor more than requested
	case r.hostConfig.StaticResources:
		return map[string]string{cpus: "0"}, true
	}
	return map[string]string{cpus: strconv.Itoa(t.CPUs)}, false
}
