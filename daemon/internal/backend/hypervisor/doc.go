// Package hypervisor runs the virtual machines of sandboxes on hosts where Kata's shim does not do so itself. It
// implements Kata's "remote hypervisor" API (ttrpc over a Unix socket), with one QEMU per sandbox. A sandbox has two disks:
// one with its image, and one for what it writes. QEMU limits the rate at which both together are used. A sandbox also has a
// network of its own (package network).
//
// Package kata starts each VM with Start. Kata's shims, one per sandbox, then join their VMs through the socket. Package
// backend creates the Service. Other packages of backend may import this package for constants and helpers, such as
// SharedRoot and CopyLog. Only this package may start or kill the QEMU processes of its VMs. It does not remove the files
// and mounts that the shims leave on the host.
//
// # Lifetimes
//
// A VM begins with Start, before it has a shim, so that it starts while containerd starts the shim. The shim joins it with
// CreateVM, and gets the result of the start from StartVM. Until then, only the caller of Start ends a VM that is not
// needed, with Remove. If msbd dies before the shim has joined, Recover removes the VM.
//
// QEMU runs in its own session, so it survives msbd. Recover finds it again. When a VM's shim dies, the service removes
// the VM, because only its shim can report about it to containerd. When QEMU dies, the shim notices that its guest is
// gone and reports that to containerd.
//
// # Templates
//
// BuildTemplate boots a VM, lets its guest create a container, and saves it as a template. Start then restores the
// template instead of booting a VM, if the template has the same size, image and container. If that fails, it boots the VM.
// Before the shim can use the guest of such a clone, the guest gets what makes it differ from all other clones: a seed for
// its random numbers, the token of its portal, and the time. Templates also survive msbd, in Config.TemplateDir, but not
// a restart of the host. Package kata decides which templates are built.
//
// VMs of earlier versions have no disks, but a virtiofsd. The service adopts them and removes them when they end.
//
// # How the processes of a VM are found
//
// Each process has the environment variable MSB_VM, its mark, which holds its role and its VM's directory. A process
// has the mark from its start, so that processes can be found no matter when msbd crashed. A pid alone is never
// trusted, because pids are reused; the mark is checked as well.
//
// VMs returns the pid of each VM's QEMU. Only tests use it.
package hypervisor
