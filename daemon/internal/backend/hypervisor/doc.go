// Package hypervisor runs the virtual machines of sandboxes on hosts where Kata's shim does not do so itself. It
// implements Kata's "remote hypervisor" API (ttrpc over a Unix socket), with one QEMU and one virtiofsd per sandbox.
//
// Kata's shims, one per sandbox, call the service through the socket. Package backend creates the Service and calls its
// methods. Other packages of backend may import this package for constants and helpers, such as SharedRoot and
// KeepConsole. Only this package may start or kill the QEMU processes of its VMs. It does not remove the files and
// mounts that the shims leave on the host.
//
// # Lifetimes
//
// QEMU and virtiofsd run in separate sessions, so they survive msbd. Recover finds them again. When a VM's shim
// dies, the service removes the VM, because only its shim can report about it to containerd. When QEMU dies, the shim
// notices that its guest is gone and reports that to containerd.
//
// # How the processes of a VM are found
//
// Each process has the environment variable MSB_VM, its mark, which holds its role and its VM's directory. A process
// has the mark from its start, so that processes can be found no matter when msbd crashed. A pid alone is never
// trusted, because pids are reused; the mark is checked as well.
//
// QEMU and virtiofsd stay in the cgroup of msbd's service, not in the shim's cgroup. VMs returns the pid of each VM's
// QEMU. Only tests use VMs.
package hypervisor
