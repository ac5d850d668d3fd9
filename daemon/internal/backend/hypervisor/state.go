package hypervisor

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/msbd/msbd/daemon/internal/sys/durable"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

const stateFile = "state.json"

// state is the content of the state file in a VM's directory. The file is first written before the VM has any process,
// and again after each start of a process.
type state struct {
	ID        string    `json:"id"`
	VCPUs     int       `json:"vcpus"`
	MemoryMiB int       `json:"memory_mib"`
	Since     time.Time `json:"since"`
	// Shim is the VM's shim. It is zero until the shim has joined the VM.
	Shim process.ID `json:"shim"`
	// Disks are the VM's disks. A VM of an earlier version has none. It has a virtiofsd, which shares its root file
	// system.
	Disks *Disks `json:"disks,omitempty"`
	// UID is the user of QEMU. It is 0 for a VM of an earlier version, whose QEMU runs as msbd's user, without a jail.
	UID uint32 `json:"uid,omitempty"`
	// Tap is the descriptor of QEMU that is the tap of the sandbox's network. It is 0 for a VM of an earlier version, which has
	// no network.
	Tap int `json:"tap,omitempty"`
	// Token is the token with which msbd connects to the portal.
	Token string `json:"token,omitempty"`
	// Processes are QEMU and, in a VM without disks, virtiofsd. One is missing if it does not run yet, if msbd was killed
	// right after it started it, or if an msbd that did not record it started it.
	Processes map[role]process.ID `json:"processes,omitempty"`
}

// guestMemoryMiB returns the memory of the guest. The guest's kernel uses some memory to manage each page, so it is 1/32
// more.
func (st state) guestMemoryMiB() int { return st.MemoryMiB + st.MemoryMiB/32 + memoryHeadroomMiB }

// roles returns the roles of the processes without which the VM cannot run.
func (st state) roles() []role {
	if st.Disks == nil {
		return []role{roleQEMU, roleVirtiofsd}
	}
	return []role{roleQEMU}
}

func writeState(dir string, st state) error {
	data, err := json.Marshal(st)
	if err == nil {
		err = durable.WriteFile(filepath.Join(dir, stateFile), data, 0o600)
	}
	if err != nil {
		return fmt.Errorf("write the VM's state: %w", err)
	}
	return nil
}

func readState(dir string) (state, error) {
	data, err := os.ReadFile(filepath.Join(dir, stateFile))
	if err != nil {
		return state{}, fmt.Errorf("read the VM's state: %w", err)
	}
	var st state
	if err := json.Unmarshal(data, &st); err != nil {
		return state{}, fmt.Errorf("read the VM's state: %w", err)
	}
	if st.ID != filepath.Base(dir) || st.Shim.PID < 0 {
		return state{}, fmt.Errorf("read the VM's state: %s is invalid or belongs to another VM (id %q)", stateFile, st.ID)
	}
	return st, nil
}
