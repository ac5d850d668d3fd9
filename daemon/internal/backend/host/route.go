// Package host examines the machine that msbd runs on. It decides which hypervisor and accelerator microVMs use, and
// why, and which changes to the machine would allow better ones. It changes nothing on the machine.
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
	// Kata is Kata's own driver: the shim starts QEMU (or what its configuration names) itself.
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
	// KataConfig and KataShim are paths of the host's own Kata. If empty, msbd's built-in ones are used.
	KataConfig, KataShim string
	// QEMU and Virtiofsd are the programs' paths. If empty, the distribution's programs are used.
	QEMU, Virtiofsd string
	// LibDir holds the built-in shim and guest.
	LibDir string
	// CacheDir is where the result of KVM's speed test is kept until the next boot of the host. If empty, it is not
	// kept.
	CacheDir string
}

// A Route is the combination of hypervisor and accelerator that microVMs of this host run on.
type Route struct {
	Hypervisor       string `json:"hypervisor"`
	HypervisorReason string `json:"hypervisor_reason"`
	// Accelerator is what this host offers. If the host's own Kata configuration names a remote hypervisor, that
	// hypervisor may use another one.
	Accelerator       string `json:"accelerator"`
	AcceleratorReason string `json:"reason"`
	// Advice lists what an administrator can do for better isolation. Each item has the command.
	Advice []string `json:"advice"`

	ownShim, ownConfig, dragonball bool
}

// Choose returns the route for these settings. If the host lacks something that a setting requires, the error is
// errdefs.ErrFailedPrecondition and says what is missing. If a setting is invalid, it is errdefs.ErrInvalidArgument.
func Choose(o Options) (Route, error) {
	return machine{}.survey(o, true).choose(o)
}

// A survey holds the facts about the host that the choice depends on.
type survey struct {
	kvm, vsock *obstacle // nil if usable
	driver     string    // hypervisor driver in the host's own Kata configuration; empty if there is no such configuration
	err        error     // from reading that configuration
}

// survey examines the host. If keep is set, it stores the result of KVM's speed test in o.CacheDir.
func (m machine) survey(o Options, keep bool) survey {
	s := survey{kvm: m.kvmObstacle(o.Accelerator == KVM, o.CacheDir, keep), vsock: m.vsockObstacle()}
	if o.KataConfig != "" {
		var config kataconf.Config
		config, s.err = kataconf.Read(o.KataConfig)
		s.driver = config.Driver
	}
	return s
}

func (s survey) choose(o Options) (Route, error) {
	r := Route{ownShim: o.KataShim != "", ownConfig: o.KataConfig != "", dragonball: s.driver == "dragonball"}
	if s.err != nil {
		return Route{}, s.err
	}
	switch o.Accelerator {
	case TCG:
		r.Accelerator, r.AcceleratorReason = TCG, "configured"
	case KVM:
		if s.kvm != nil {
			return Route{}, fmt.Errorf("use KVM: %w: %w", s.kvm, errdefs.ErrFailedPrecondition)
		}
		r.Accelerator, r.AcceleratorReason = KVM, "configured"
	case auto, "":
		r.Accelerator, r.AcceleratorReason = KVM, "KVM is usable"
		if s.kvm != nil {
			r.Accelerator, r.AcceleratorReason = TCG, "KVM is not usable: "+s.kvm.what
		}
	default:
		return Route{}, fmt.Errorf("use accelerator %q: it must be auto, kvm or tcg: %w", o.Accelerator, errdefs.ErrInvalidArgument)
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
			return Route{}, fmt.Errorf("use Kata's own driver: it needs KVM, but accelerator tcg is configured: %w", errdefs.ErrInvalidArgument)
		case needsKVM && s.kvm != nil:
			return Route{}, fmt.Errorf("use Kata's own driver: %w: %w", s.kvm, errdefs.ErrFailedPrecondition)
		case needsVsock && s.vsock != nil:
			return Route{}, fmt.Errorf("use Kata's own driver: %w: %w", s.vsock, errdefs.ErrFailedPrecondition)
		}
	case !o.automatic():
		return Route{}, fmt.Errorf("use hypervisor %q: it must be auto, kata or builtin: %w", o.Hypervisor, errdefs.ErrInvalidArgument)
	// Kata's own driver also needs QEMU and virtiofsd. They do not matter here, because Builtin needs them as well.
	case r.Accelerator == TCG:
		r.Hypervisor, r.HypervisorReason = Builtin, "Kata's own driver needs KVM"
	case s.vsock != nil:
		r.Hypervisor, r.HypervisorReason = Builtin, s.vsock.Error()
	default:
		r.Hypervisor, r.HypervisorReason = Kata, "KVM and /dev/vhost-vsock are usable"
	}
	r.Advice = s.advice(o, r)
	return r, nil
}

func (o Options) automatic() bool { return o.Hypervisor == auto || o.Hypervisor == "" }

// needs reports which devices are required by the settings. driver is the one in KataConfig. Devices are required only
// if the settings select Kata's own driver.
func (o Options) needs(driver string) (kvm, vsock bool) {
	switch {
	case o.Hypervisor != Kata && o.KataConfig == "", driver == "remote": // a remote hypervisor runs VMs by its own means
		return false, false
	case driver == "", driver == "qemu", driver == "stratovirt":
		return true, true
	}
	return true, false // the other drivers reach their guests through a Unix socket
}

// advice returns what an administrator can do to improve the isolation of route r.
func (s survey) advice(o Options, r Route) (list []string) {
	wantsVsock := s.vsock != nil && o.automatic() && o.KataConfig == ""
	switch {
	case r.Hypervisor == Kata:
		return nil // it uses KVM, or a hypervisor that msbd does not know
	case r.Accelerator == TCG && s.kvm == nil:
		return []string{"to use KVM, which is usable here: remove the setting accelerator"}
	case r.Accelerator == TCG:
		list = append(list, "to use KVM, for isolation by the hardware: "+s.kvm.advice())
		wantsVsock = wantsVsock && s.kvm.fixableHere
	}
	if wantsVsock {
		list = append(list, "to use Kata's own driver: "+s.vsock.advice())
	}
	return list
}
