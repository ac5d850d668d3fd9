// Package hypervisor runs the virtual machines of sandboxes where Kata's shim does not do so itself. It serves
// Kata's "remote hypervisor" (ttrpc over a Unix socket) and answers it with one QEMU and one virtiofsd
// per sandbox.
//
// Kata's shims, one per sandbox, call it through the socket. Package backend makes the Service and uses its Go methods.
// It is a base package: others of backend may import it for what they share with it, but nothing else may start or kill
// its QEMUs. What the shims leave on the host is not its affair.
//
// # What outlives what
//
// QEMU and virtiofsd run in sessions of their own and outlive msbd; Recover finds them again. A VM
// dies with its shim, because nobody else could speak for it. When QEMU dies, the shim sees that its
// guest is gone and reports so to containerd.
//
// # How a VM's processes are found
//
// Each carries the environment variable MSB_VM, which names its role and its VM's directory. No
// process can run before it is marked, so a crash of msbd at any moment leaves nothing that cannot
// be found; and no number is trusted alone: pids are reused, a mark is not.
//
// QEMU and virtiofsd stay in the cgroup of msbd's service, not in the shim's. VMs gives their pids to
// whoever accounts for them.
package hypervisor
