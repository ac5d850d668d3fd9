// Package hypervisor runs the virtual machines of sandboxes on hosts where Kata's shim does not do so itself. It
// implements Kata's "remote hypervisor" API (ttrpc over a Unix socket), with one QEMU per sandbox. A sandbox has two disks:
// one with its image, and one for what it writes.
//
// Kata's shims, one per sandbox, call the service through the socket. Package backend creates the Service and calls its
// methods. Other packages of backend may import this package for constants and helpers, such as SharedRoot and
// CopyLog. Only this package may start or kill the QEMU processes of its VMs. It does not remove the files and
// mounts that the shims leave on the host.
//
// # Lifetimes
//
// QEMU runs in its own session, so it survives msbd. Recover finds it again. When a VM's shim dies, the service removes
// the VM, because only its shim can report about it to containerd. When QEMU dies, the shim notices that its guest is
// gone and reports that to containerd.
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
