package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/msbd/msbd/daemon/internal/backend/disk"
	"github.com/msbd/msbd/daemon/internal/backend/network"
)

func (e examination) kvmDevice(context.Context) Check {
	const name = "KVM"
	required := e.Accelerator == KVM
	needed, _ := e.needs(e.driver)
	switch obs := e.survey.kvm; {
	case obs != nil && obs.denied:
		return warning(name, obs.advice(), "not checked: %s", obs.what)
	case obs != nil && (needed || required):
		return problem(name, obs.advice(), "%s", obs.what)
	case obs != nil && e.Accelerator == TCG:
		return ok(name, "not used, because accelerator tcg is configured (and not usable: %s)", obs.what)
	case obs != nil:
		return warning(name, obs.advice(), "%s", obs.what)
	}
	cpu := e.processor()
	detail := "usable"
	if cpu.flag != "" {
		detail += ", " + cpu.flag + ", module " + cpu.module
	}
	if cpu.virtual {
		detail += ", nested (this machine is itself virtual)"
	}
	switch e.Accelerator {
	case KVM:
		detail += "; its speed was not tested, because accelerator kvm is configured"
	case TCG:
		return warning(name, "remove the setting accelerator", "%s, but accelerator tcg is configured", detail)
	}
	return ok(name, "%s", detail)
}

func (e examination) vsockDevice(context.Context) Check {
	const name = "vhost-vsock"
	_, needed := e.needs(e.driver)
	switch obs := e.survey.vsock; {
	case !e.ownDriver():
		return Check{}
	case obs == nil:
		return ok(name, "usable")
	case obs.denied:
		return warning(name, obs.advice(), "not checked: %s", obs.what)
	case needed:
		return problem(name, obs.advice(), "%s", obs.what)
	default:
		return ok(name, "%s; not needed with this Kata configuration", obs.what)
	}
}

// testedQEMU is the oldest version of QEMU that msbd was tested with.
const testedQEMU = "7.2.0"

func (e examination) qemu(ctx context.Context) Check {
	const name = "QEMU"
	if e.KataConfig != "" {
		return Check{} // KataConfig names the hypervisor
	}
	path, err := FindQEMU(e.QEMU)
	if err != nil {
		return problem(name, "apt install qemu-system-x86, or set qemu to its path", "%v", withoutClass(err))
	}
	version, _, err := askVersion(ctx, path, qemuVersionRE)
	switch {
	case err != nil:
		return problem(name, "reinstall it, or set qemu to the path of another one", "%v", err)
	case older(version, testedQEMU):
		return warning(name, "install QEMU "+testedQEMU+" or newer", "%s, %s: older than %s, the oldest that msbd was tested with", version, path, testedQEMU)
	}
	return ok(name, "%s, %s", version, path)
}

func (e examination) virtiofsd(ctx context.Context) Check {
	const name = "virtiofsd"
	if e.KataConfig != "" || !e.ownDriver() {
		return Check{}
	}
	path, err := FindVirtiofsd(e.Virtiofsd)
	if err != nil {
		return problem(name, "apt install virtiofsd (Debian 12: qemu-system-common), or set virtiofsd to its path", "%v", withoutClass(err))
	}
	version, output, err := askVersion(ctx, path, virtiofsdVersionRE)
	if err != nil {
		return problem(name, "reinstall it, or set virtiofsd to the path of another one", "%v", err)
	}
	kind := "Rust"
	if isCVirtiofsd(output) {
		kind = "the C version, from QEMU"
		translator := filepath.Join(e.LibDir, "msb-virtiofsd")
		if _, err := os.Stat(translator); err != nil && e.LibDir != "" {
			return problem(name, "reinstall msbd, or install the Rust virtiofsd", "%s (%s), %s: it cannot run without msb-virtiofsd: %v", version, kind, path, err)
		}
	}
	return ok(name, "%s (%s), %s", version, kind, path)
}

func (e examination) mkfsErofs(context.Context) Check { return e.mkfs(disk.MkfsErofs) }

func (e examination) mkfsExt4(context.Context) Check { return e.mkfs(disk.MkfsExt4) }

func (e examination) mkfs(program disk.Program) Check {
	if e.ownDriver() {
		return Check{} // only msbd's hypervisor service uses disks
	}
	path, err := program.Find()
	if err != nil {
		return problem(program.Name, "apt install "+program.Package, "%v", withoutClass(err))
	}
	return ok(program.Name, "%s", path)
}

// network checks what package network needs. The kernel loads most modules by itself.
func (e examination) network(context.Context) Check {
	const name, device = "network", "/dev/net/tun"
	switch {
	case e.ownDriver():
		return Check{} // only with msbd's hypervisor service, sandboxes have a network that msbd makes
	case os.Geteuid() != 0:
		return warning(name, asRoot, "not checked: only root can create a network for a sandbox")
	}
	fd, err := unix.Open(e.root+device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		obs := e.deviceObstacle(device, "tun", err)
		return problem(name, obs.advice(), "%s", obs.what)
	}
	unix.Close(fd)
	if err := network.Check(); err != nil {
		return problem(name, "modprobe -a tun nf_tables nft_ct; run a container with msbd privileged", "%v", withoutClass(err))
	}
	return ok(name, "network namespaces, %s and nf_tables are usable", device)
}

func (e examination) kata(ctx context.Context) Check {
	const name = "Kata"
	if e.survey.err != nil {
		return problem(name, "fix the file, or remove the setting kata-config", "%v", withoutClass(e.survey.err))
	}
	shim, from := e.KataShim, "from the host"
	if shim == "" {
		if e.LibDir == "" {
			return Check{}
		}
		shim, from = filepath.Join(e.LibDir, "containerd-shim-kata-v2"), "built in"
	}
	version, output, err := askVersion(ctx, shim, kataVersionRE)
	if err != nil {
		return problem(name, "reinstall msbd, or fix the setting kata-shim", "%v", err)
	}
	detail := fmt.Sprintf("%s, %s", readable(version), from)
	if strings.Contains(output, "(Rust)") {
		detail += ", Rust runtime"
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
			return problem(name, "reinstall msbd", "%v", err)
		}
		return ok(name, "%s, built in", version)
	}
	version, err := containerdVersion(ctx, e.Server.Containerd)
	switch {
	case errors.Is(err, os.ErrPermission):
		return warning(name, asRoot, "not checked: %v", err)
	case err != nil:
		return problem(name, "start it, or remove the setting containerd", "%v", err)
	}
	if text := ContainerdWarning(version); text != "" {
		return warning(name, "update it, or remove the setting containerd", "%s", text)
	}
	return ok(name, "%s, at %s", version, e.Server.Containerd)
}

// containerdVersion returns the version of the containerd that is running at socket.
func containerdVersion(ctx context.Context, socket string) (string, error) {
	if err := tryDial(ctx, "unix", socket); err != nil { // its error is clearer than gRPC's
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return "", err
	}
	defer conn.Close()
	answer, err := versionapi.NewVersionClient(conn).Version(ctx, &emptypb.Empty{})
	if err != nil {
		return "", fmt.Errorf("ask the containerd at %s for its version: %w", socket, err)
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
		dir, files, detail = e.LibDir, []string{"msb-portal"}, "configured by kata-config, with msbd's portal in "
	}
	for _, file := range files {
		info, err := os.Stat(filepath.Join(dir, file))
		if err == nil && (!info.Mode().IsRegular() || info.Size() == 0) {
			err = fmt.Errorf("%s is empty or not a regular file", filepath.Join(dir, file))
		}
		if err != nil {
			return problem(name, "build it with 'make build guest', or reinstall msbd", "%v", err)
		}
	}
	return ok(name, "%s", detail+dir)
}
