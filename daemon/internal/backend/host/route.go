// Package host examines the machine that msbd runs on. It chooses the hypervisor and the accelerator for microVMs and
// gives the reasons. It also advises which changes to the machine would allow better ones. It does not change the
// machine. The only file that it writes is the cached result of KVM's speed test, in Options.CacheDir.
//
// Package backend calls it once when the server starts. `msbd --doctor` prints its report.
package host

import (
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/sys/kataconf"
)

// Hypervisors.
const (
	// Kata is Kata's own driver. The shim itself starts QEMU, or the hypervisor that its configuration names.
	Kata = "kata"
	// Builtin is msbd's hypervisor service, which Kata's shim calls as its "remote hypervisor".
	Builtin = "builtin"
)

// Accelerators.
const (
	KVM = "kvm"
	TCG = "tcg" // QEMU emulates the processor; for development and CI only
)

const auto = "auto"

// Options are the settings that the choice depends on, as the administrator wrote them.
type Options struct {
	Hypervisor  string // "auto" (or empty), Kata or Builtin
	Accelerator string // "auto" (or empty), KVM or TCG
	// KataConfig and KataShim are paths of the host's Kata. If empty, msbd's built-in ones are used.
	KataConfig, KataShim string
	// QEMU and Virtiofsd are the programs' paths. If empty, the distribution's programs are used.
	QEMU, Virtiofsd string
	// LibDir holds the built-in shim and guest.
	LibDir string
	// CacheDir is the directory where Choose caches that KVM is fast, until the next boot of the host. Choose does not
	// cache that KVM is slow. If CacheDir is empty, nothing is cached.
	CacheDir string
}

// A Route is the combination of hypervisor and accelerator that microVMs of this host run on.
type Route struct {
	Hypervisor       string `json:"hypervisor"`
	HypervisorReason string `json:"hypervisor_reason"`
	// Accelerator is KVM or TCG. If the host's Kata configuration names a remote hypervisor, that hypervisor may use
	// another accelerator.
	Accelerator       string `json:"accelerator"`
	AcceleratorReason string `json:"reason"`
	// Advice lists what an administrator can do for better isolation. An item has a command if there is one.
	Advice []string `json:"advice"`

	// hostShim and hostConfig are set if the settings name the host's Kata. dragonball is set if its configuration uses
	// the hypervisor Dragonball.
	hostShim, hostConfig, dragonball bool
}

// Choose returns the route for these settings. It returns errdefs.ErrFailedPrecondition, with a message that says what
// is missing, if the host lacks something that a setting requires. It returns errdefs.ErrInvalidArgument if a setting
// is invalid.
func Choose(o Options) (Route, error) {
	return machine{}.survey(o, true).choose(o)
}

// A survey holds the facts about the host that the choice depends on.
type survey struct {
	kvm, vsock *obstacle // nil if usable
	driver     string    // hypervisor driver in the host's Kata configuration; empty without Options.KataConfig
	err        error     // from reading that configuration
}

// survey examines the host. If writeCache is set and KVM is fast, it records that in o.CacheDir.
func (m machine) survey(o Options, writeCache bool) survey {
	s := survey{kvm: m.kvmObstacle(o.Accelerator == KVM, o.CacheDir, writeCache), vsock: m.vsockObstacle()}
	if o.KataConfig != "" {
		var config kataconf.Config
		config, s.err = kataconf.Read(o.KataConfig)
		s.driver = config.Driver
	}
	return s
}

// choose returns the route for the settings o on the host that s describes. It returns the same errors as Choose. It
// has no side effects.
func (s survey) choose(o Options) (Route, error) {
	r := Route{hostShim: o.KataShim != "", hostConfig: o.KataConfig != "", dragonball: s.driver == "dragonball"}
	if s.err != nil {
		return Route{}, s.err
	}
	switch o.Accelerator {
	case TCG:
		r.Accelerator, r.AcceleratorReason = TCG, "configured"
	case KVM:
		if s.kvm != nil {
			return Route{}, fmt.Errorf("KVM is not usable: %w: %w", s.kvm, errdefs.ErrFailedPrecondition)
		}
		r.Accelerator, r.AcceleratorReason = KVM, "configured"
	case auto, "":
		r.Accelerator, r.AcceleratorReason = KVM, "KVM is usable"
		if s.kvm != nil {
			r.Accelerator, r.AcceleratorReason = TCG, "KVM is not usable: "+s.kvm.what
		}
	default:
		return Route{}, fmt.Errorf("invalid accelerator %q: it must be auto, kvm or tcg: %w", o.Accelerator, errdefs.ErrInvalidArgument)
	}

	needsKVM, needsVsock := o.needs(s.driver)
	switch {
	case o.Hypervisor == Builtin:
		r.Hypervisor, r.HypervisorReason = Builtin, "configured"
	case o.Hypervisor == Kata, o.automatic() && o.KataConfig != "":
		r.Hypervisor, r.HypervisorReason = Kata, "configured"
		if o.automatic() {
			r.HypervisorReason = "kata-config is configured"
		}
		switch {
		case needsKVM && o.Accelerator == TCG:
			return Route{}, fmt.Errorf("hypervisor kata is not usable: Kata's own driver needs KVM, but accelerator tcg is configured: %w", errdefs.ErrInvalidArgument)
		case needsKVM && s.kvm != nil:
			return Route{}, fmt.Errorf("hypervisor kata is not usable: %w: %w", s.kvm, errdefs.ErrFailedPrecondition)
		case needsVsock && s.vsock != nil:
			return Route{}, fmt.Errorf("hypervisor kata is not usable: %w: %w", s.vsock, errdefs.ErrFailedPrecondition)
		}
	case !o.automatic():
		return Route{}, fmt.Errorf("invalid hypervisor %q: it must be auto, kata or builtin: %w", o.Hypervisor, errdefs.ErrInvalidArgument)
	default:
		r.Hypervisor, r.HypervisorReason = Builtin, "the default; it runs on every host"
	}
	r.Advice = s.advice(r)
	return r, nil
}

func (o Options) automatic() bool { return o.Hypervisor == auto || o.Hypervisor == "" }

// ownDriver reports whether sandboxes are to run with Kata's own driver, which needs more of the host.
func (o Options) ownDriver() bool { return o.Hypervisor == Kata || o.KataConfig != "" }

// needs reports whether the settings o require KVM and vhost-vsock. They do so only if they select Kata's own driver.
// driver is the hypervisor driver that o.KataConfig names.
func (o Options) needs(driver string) (kvm, vsock bool) {
	switch {
	case !o.ownDriver(), driver == "remote": // a remote hypervisor may run VMs without these devices
		return false, false
	case driver == "", driver == "qemu", driver == "stratovirt":
		return true, true
	}
	return true, false // the other drivers reach their guests through a Unix socket
}

// advice returns what an administrator can do to improve the isolation of route r.
func (s survey) advice(r Route) []string {
	switch {
	case r.Hypervisor == Kata || r.Accelerator == KVM:
		return nil // the route uses KVM, or a hypervisor that msbd does not know
	case s.kvm == nil:
		return []string{"to use KVM, which is usable here: remove the setting accelerator"}
	}
	return []string{"to use KVM, for isolation by the hardware: " + s.kvm.advice()}
}
