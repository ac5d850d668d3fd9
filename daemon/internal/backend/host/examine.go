package host

import (
	"context"
	"fmt"
)

// Server holds the settings of a server that Examine checks in addition to Options.
type Server struct {
	StateDir string
	Socket   string // admin socket
	Listen   string // HOST:PORT of the gateway
	// Containerd is the socket of the host's containerd to use. If empty, the server runs a private containerd.
	Containerd     string
	MaxConnections int
	// DefaultMemoryMiB is the memory of a sandbox that does not request any, and MaxMemoryMiB the most it may request.
	DefaultMemoryMiB, MaxMemoryMiB int
	// Group is the group whose members may use the socket.
	Group string
}

// A Report is the result of Examine.
type Report struct {
	// Status is the worst status of Checks.
	Status Status `json:"status"`
	// Isolation is the route that sandboxes would use. It is nil if no route is possible, or if this user may not open
	// a device, so that the route is unknown.
	Isolation *Route  `json:"isolation"`
	Checks    []Check `json:"checks"`
}

// A Check is one line of the report.
type Check struct {
	// Name is what was checked, such as "KVM" or "vhost-vsock".
	Name string `json:"name"`
	// Status is OK, Warning or Problem.
	Status Status `json:"status"`
	// Detail is what was found.
	Detail string `json:"detail"`
	// Remedy is how to fix it, with commands where possible. It is empty if Status is OK.
	Remedy string `json:"remedy,omitempty"`
}

// Status is the result of a Check.
type Status string

// The results of a Check. A Problem prevents sandboxes from starting as configured; a Warning does not.
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

// An examination holds what the checks need. Its methods are the checks.
type examination struct {
	machine
	Options
	Server
	survey
	route Route // zero if sandboxes cannot run as configured
}

// Examine checks everything that microVMs need on this host. It does not change the host. Each program that it runs has
// a short timeout. The report begins with callerChecks, which are the results of checks that the caller has done.
func Examine(ctx context.Context, o Options, s Server, callerChecks ...Check) Report {
	return machine{}.examine(ctx, o, s, callerChecks...)
}

func (m machine) examine(ctx context.Context, o Options, s Server, callerChecks ...Check) Report {
	e := examination{machine: m, Options: o, Server: s, survey: m.survey(o, false)}
	r := Report{Status: OK}
	for _, c := range callerChecks {
		r.add(c)
	}
	var err error
	e.route, err = e.choose(o)
	denied := e.survey.kvm != nil && e.survey.kvm.denied || e.ownDriver() && e.survey.vsock != nil && e.survey.vsock.denied
	if err == nil && !denied {
		r.Isolation = &e.route
		r.Isolation.Advice = append([]string{}, r.Isolation.Advice...) // not nil, so that its JSON is [] instead of null
	}
	for _, check := range []func(context.Context) Check{
		e.system, e.user, e.cgroups, e.kvmDevice, e.vsockDevice,
		e.qemu, e.virtiofsd, e.mkfsErofs, e.mkfsExt4, e.network, e.kata, e.containerd, e.guest,
		e.memory, e.disk, e.directories, e.overlayfs, e.clock, e.systemLog, e.files, e.group, e.port,
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
