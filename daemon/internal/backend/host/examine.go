package host

import (
	"context"
	"fmt"
)

// Server is what else of a server's settings its host has to be good for.
type Server struct {
	StateDir string
	Socket   string // for administrators
	Listen   string // HOST:PORT of the gateway
	// Containerd is the address of the one to use; empty: a private one.
	Containerd     string
	MaxConnections int
	// What a sandbox gets, and may ask for.
	DefaultMemoryMiB, MaxMemoryMiB int
	// Group may use the socket.
	Group string
}

// A Report is what the doctor found.
type Report struct {
	// Status is the worst of Checks.
	Status Status `json:"status"`
	// Isolation is what sandboxes would run on; nil if they could not, or if this user cannot tell.
	Isolation *Route  `json:"isolation"`
	Checks    []Check `json:"checks"`
}

// A Check is one line of the report.
type Check struct {
	// Name is what was looked at, such as "KVM" or "vhost-vsock".
	Name string `json:"name"`
	// Status is OK, Warning or Problem.
	Status Status `json:"status"`
	// Detail is what was found.
	Detail string `json:"detail"`
	// Remedy is what to do about it, as commands where there are some; empty when all is well.
	Remedy string `json:"remedy,omitempty"`
}

// Status of a Check.
type Status string

// The states of a Check. A Problem keeps sandboxes from starting as configured; a Warning does not.
const (
	OK      Status = "ok"
	Warning Status = "warning"
	Problem Status = "problem"
)

func (r *Report) add(c Check) {
	r.Checks = append(r.Checks, c)
	if c.Status == Problem || c.Status == Warning && r.Status == OK {
		r.Status = c.Status
	}
}

// An examination looks at one thing after the other.
type examination struct {
	machine
	Options
	Server
	survey
	route Route // zero if there is none
}

// Examine looks at everything that microVMs need of this host. It changes nothing, and waits for no program
// for long. The report begins with the checks that the caller has made.
func Examine(ctx context.Context, o Options, s Server, made ...Check) Report {
	return machine{}.examine(ctx, o, s, made...)
}

func (m machine) examine(ctx context.Context, o Options, s Server, made ...Check) Report {
	e := examination{machine: m, Options: o, Server: s, survey: m.survey(o, false)}
	r := Report{Status: OK}
	for _, c := range made {
		r.add(c)
	}
	var err error
	e.route, err = e.choose(o)
	denied := e.survey.kvm != nil && e.survey.kvm.denied || e.survey.vsock != nil && e.survey.vsock.denied
	if err == nil && !denied {
		r.Isolation = &e.route
		r.Isolation.Advice = append([]string{}, r.Isolation.Advice...) // an empty list, not null
	}
	for _, check := range []func(context.Context) Check{
		e.system, e.user, e.cgroups, e.kvmDevice, e.vsockDevice,
		e.qemu, e.virtiofsd, e.kata, e.containerd, e.guest,
		e.memory, e.disk, e.overlayfs, e.clock, e.systemLog, e.files, e.group, e.port,
	} {
		if c := check(ctx); c.Name != "" {
			r.add(c)
		}
	}
	if err != nil && !denied && r.Status != Problem {
		r.add(Check{Name: "isolation", Status: Problem, Detail: err.Error(), Remedy: "change the settings hypervisor and accelerator"})
	}
	return r
}

func ok(name, format string, a ...any) Check {
	return Check{Name: name, Status: OK, Detail: fmt.Sprintf(format, a...)}
}

func warning(name, remedy, format string, a ...any) Check {
	return Check{Name: name, Status: Warning, Detail: fmt.Sprintf(format, a...), Remedy: remedy}
}

func problem(name, remedy, format string, a ...any) Check {
	return Check{Name: name, Status: Problem, Detail: fmt.Sprintf(format, a...), Remedy: remedy}
}
