// Package host knows the machine that msbd runs on: which hypervisor and accelerator it can use for
// microVMs, why, and what is missing for a better one. It changes nothing on it.
//
// Package backend asks it once at the start; `msbd --doctor` asks it for a report.
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
	// Builtin is msbd's hypervisor service, which Kata's shim asks as its "remote hypervisor".
	Builtin = "builtin"
)

// Accelerators.
const (
	KVM = "kvm"
	TCG = "tcg" // QEMU emulates the processor: for development and CI
)

const auto = "auto"

// Options are the settings that the choice depends on, as an administrator gives them.
type Options struct {
	Hypervisor  string // "auto" (or empty), Kata or Builtin
	Accelerator string // "auto" (or empty), KVM or TCG
	// KataConfig and KataShim are the host's own; empty: the built-in ones.
	KataConfig, KataShim string
	// QEMU and Virtiofsd are the programs' paths; when empty they are looked for.
	QEMU, Virtiofsd string
	// LibDir holds the built-in shim and guest.
	LibDir string
	// CacheDir keeps the one answer that takes time, until the next boot of the host; empty: it is asked again.
	CacheDir string
}

// A Route is what microVMs of this host run on.
type Route struct {
	Hypervisor       string `json:"hypervisor"`
	HypervisorReason string `json:"hypervisor_reason"`
	// Accelerator is only what the host offers, if a Kata configuration of its own names a hypervisor elsewhere.
	Accelerator       string `json:"accelerator"`
	AcceleratorReason string `json:"reason"`
	// Advice is what an administrator could do for a better isolation, each with its command.
	Advice []string `json:"advice"`

	ownShim, ownConfig, dragonball bool
}

// Choose turns the settings into a route. What was asked for and cannot be had is
// errdefs.ErrFailedPrecondition, with what is missing; a setting that means nothing, errdefs.ErrInvalidArgument.
func Choose(o Options) (Route, error) {
	return machine{}.survey(o, true).choose(o)
}

// A survey is what of the host the choice depends on.
type survey struct {
	kvm, vsock *obstacle // nil: usable
	driver     string    // of the Kata configuration of the host's own; empty: there is none
	err        error     // in reading that
}

// survey looks at the host. With keep, it writes to the directory of what is known.
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
		return Route{}, fmt.Errorf("use accelerator %q: need auto, kvm or tcg: %w", o.Accelerator, errdefs.ErrInvalidArgument)
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
		return Route{}, fmt.Errorf("use hypervisor %q: need auto, kata or builtin: %w", o.Hypervisor, errdefs.ErrInvalidArgument)
	// QEMU and virtiofsd, the rest that Kata's own driver needs, the other needs as well.
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

// needs says what Kata cannot do without, if its own driver is what the settings ask for.
func (o Options) needs(driver string) (kvm, vsock bool) {
	switch {
	case o.Hypervisor != Kata && o.KataConfig == "", driver == "remote": // which brings its own
		return false, false
	case driver == "", driver == "qemu", driver == "stratovirt":
		return true, true
	}
	return true, false // it reaches its guests through a Unix socket
}

// advice is what would make the isolation of a route better.
func (s survey) advice(o Options, r Route) (list []string) {
	wantsVsock := s.vsock != nil && o.automatic() && o.KataConfig == ""
	switch {
	case r.Hypervisor == Kata:
		return nil // with KVM, or with a hypervisor that only its configuration knows
	case r.Accelerator == TCG && s.kvm == nil:
		return []string{"use KVM, which is usable here: leave out the setting accelerator"}
	case r.Accelerator == TCG:
		list = append(list, "for KVM, the hardware boundary: "+s.kvm.advice())
		wantsVsock = wantsVsock && s.kvm.fixableHere
	}
	if wantsVsock {
		list = append(list, "for Kata's own driver: "+s.vsock.advice())
	}
	return list
}
