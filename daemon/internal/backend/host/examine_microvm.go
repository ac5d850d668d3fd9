package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"
)

func (e examination) kvmDevice(context.Context) Check {
	const name = "KVM"
	insist := e.Accelerator == KVM
	needed, _ := e.needs(e.driver)
	switch l := e.survey.kvm; {
	case l != nil && l.denied:
		return warning(name, l.advice(), "not looked at: %s", l.what)
	case l != nil && (needed || insist):
		return problem(name, l.advice(), "%s", l.what)
	case l != nil && e.Accelerator == TCG:
		return ok(name, "not wanted (accelerator tcg is configured), and not usable: %s", l.what)
	case l != nil:
		return warning(name, l.advice(), "%s", l.what)
	}
	cpu := e.processor()
	detail := "usable"
	if cpu.flag != "" {
		detail += ", " + cpu.flag + " by " + cpu.module
	}
	if cpu.virtual {
		detail += ", nested: this machine is virtual itself"
	}
	switch e.Accelerator {
	case KVM:
		detail += "; its speed was not tried, because accelerator kvm is configured"
	case TCG:
		return warning(name, "leave out the setting accelerator", "%s, but accelerator tcg is configured", detail)
	}
	return ok(name, "%s", detail)
}

func (e examination) vsockDevice(context.Context) Check {
	const name = "vhost-vsock"
	_, needed := e.needs(e.driver)
	l := e.survey.vsock
	switch kvm := e.survey.kvm; {
	case l == nil:
		return ok(name, "usable")
	case l.denied:
		return warning(name, l.advice(), "not looked at: %s", l.what)
	case needed:
		return problem(name, l.advice(), "%s", l.what)
	case e.automatic() && e.KataConfig == "" && e.Accelerator != TCG && (kvm == nil || kvm.fixableHere):
		return warning(name, l.advice(), "%s: Kata's own driver needs it", l.what)
	}
	return ok(name, "%s; only Kata's own driver needs it, with KVM", l.what)
}

// goodQEMU is the oldest version that msbd was run with.
const goodQEMU = "7.2.0"

func (e examination) qemu(ctx context.Context) Check {
	const name = "QEMU"
	if e.KataConfig != "" {
		return Check{} // which names its hypervisor
	}
	path, err := FindQEMU(e.QEMU)
	if err != nil {
		return problem(name, "apt install qemu-system-x86, or name its path with qemu", "%v", plain(err))
	}
	version, _, err := askVersion(ctx, path, qemuVersionRE)
	switch {
	case err != nil:
		return problem(name, "install it again, or name another with qemu", "%v", err)
	case older(version, goodQEMU):
		return warning(name, "install QEMU "+goodQEMU+" or newer", "%s, %s: older than %s, the oldest that msbd was tried with", version, path, goodQEMU)
	}
	return ok(name, "%s, %s", version, path)
}

func (e examination) virtiofsd(ctx context.Context) Check {
	const name = "virtiofsd"
	if e.KataConfig != "" {
		return Check{}
	}
	path, err := FindVirtiofsd(e.Virtiofsd)
	if err != nil {
		return problem(name, "apt install virtiofsd (Debian 12: qemu-system-common), or name its path with virtiofsd", "%v", plain(err))
	}
	version, said, err := askVersion(ctx, path, virtiofsdVersionRE)
	if err != nil {
		return problem(name, "install it again, or name another with virtiofsd", "%v", err)
	}
	kind := "in Rust"
	if inC(said) {
		kind = "QEMU's own, in C"
		translator := filepath.Join(e.LibDir, "msb-virtiofsd")
		if _, err := os.Stat(translator); err != nil && e.LibDir != "" {
			return problem(name, "install msbd again, or the virtiofsd in Rust", "%s (%s), %s: it needs %s", version, kind, path, translator)
		}
	}
	return ok(name, "%s (%s), %s", version, kind, path)
}

func (e examination) kata(ctx context.Context) Check {
	const name = "Kata"
	if e.survey.err != nil {
		return problem(name, "mend the file, or leave out kata-config", "%v", plain(e.survey.err))
	}
	shim, from := e.KataShim, "the host's own"
	if shim == "" {
		if e.LibDir == "" {
			return Check{}
		}
		shim, from = filepath.Join(e.LibDir, "containerd-shim-kata-v2"), "built in"
	}
	version, said, err := askVersion(ctx, shim, kataVersionRE)
	if err != nil {
		return problem(name, "install msbd again, or mend kata-shim", "%v", err)
	}
	detail := fmt.Sprintf("%s, %s", readable(version), from)
	if strings.Contains(said, "(Rust)") {
		detail += ", the runtime in Rust"
	}
	if e.driver != "" {
		detail += fmt.Sprintf("; %s configures %s", e.KataConfig, e.driver)
	}
	if fault := e.route.kataFault(version); fault != "" {
		return warning(name, newerKata, "%s; %s", detail, fault)
	}
	return ok(name, "%s", detail)
}

func (e examination) containerd(ctx context.Context) Check {
	const name = "containerd"
	if e.Server.Containerd == "" {
		if e.LibDir == "" {
			return Check{}
		}
		version, _, err := askVersion(ctx, filepath.Join(e.LibDir, "containerd"), containerdVersionRE)
		if err != nil {
			return problem(name, "install msbd again", "%v", err)
		}
		return ok(name, "%s, built in", version)
	}
	version, err := containerdVersion(ctx, e.Server.Containerd)
	switch {
	case errors.Is(err, os.ErrPermission):
		return warning(name, asRoot, "not looked at: %v", err)
	case err != nil:
		return problem(name, "start it, or leave out the setting containerd", "%v", err)
	}
	if text := ContainerdWarning(version); text != "" {
		return warning(name, "update it, or leave out the setting containerd", "%s", text)
	}
	return ok(name, "%s, at %s", version, e.Server.Containerd)
}

// containerdVersion asks a running containerd.
func containerdVersion(ctx context.Context, socket string) (string, error) {
	if err := answers(ctx, "unix", socket); err != nil { // in better words than gRPC's
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, programLimit)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	answer, err := versionapi.NewVersionClient(conn).Version(ctx, &emptypb.Empty{})
	if err != nil {
		return "", fmt.Errorf("ask the containerd at %s: %w", socket, err)
	}
	return answer.GetVersion(), nil
}

func (e examination) guest(context.Context) Check {
	const name = "guest"
	if e.LibDir == "" {
		return Check{}
	}
	dir, files, detail := filepath.Join(e.LibDir, "guest"), []string{"vmlinux", "initrd.img"}, "kernel and initramfs in "
	if e.KataConfig != "" {
		dir, files, detail = e.LibDir, []string{"msb-portal"}, "that of kata-config, with the portal in "
	}
	for _, file := range files {
		info, err := os.Stat(filepath.Join(dir, file))
		if err == nil && (!info.Mode().IsRegular() || info.Size() == 0) {
			err = fmt.Errorf("%s is no file with anything in it", filepath.Join(dir, file))
		}
		if err != nil {
			return problem(name, "build it with 'make build guest', or install msbd again", "%v", err)
		}
	}
	return ok(name, "%s", detail+dir)
}
