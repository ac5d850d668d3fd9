package hypervisor

import (
	"encoding/json"
	"errors"
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
	ID        string     `json:"id"`
	VCPUs     int        `json:"vcpus"`
	MemoryMiB int        `json:"memory_mib"`
	Since     time.Time  `json:"since"`
	Shim      process.ID `json:"shim"`
	// Processes are QEMU and virtiofsd. One is missing if it does not run yet, if msbd was killed right after it
	// started it, or if an msbd that did not record it started it.
	Processes map[role]process.ID `json:"processes,omitempty"`
}

// mountNamespace opens the mount namespace of a VM's shim, in which the sandbox's root file system is mounted.
func mountNamespace(id process.ID) (*os.File, error) {
	shim, err := id.Open()
	if err != nil {
		return nil, err
	}
	if shim == nil {
		return nil, errors.New("the shim has exited")
	}
	defer shim.Close()
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", id.PID))
	if err != nil {
		return nil, fmt.Errorf("open the shim's mount namespace: %w", err)
	}
	if shim.Dead() { // another process may have got the pid, and ns may be its namespace
		ns.Close()
		return nil, errors.New("the shim has exited")
	}
	return ns, nil
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
	if st.ID != filepath.Base(dir) || st.Shim.PID <= 0 {
		return state{}, fmt.Errorf("read the VM's state: %s is invalid or belongs to another VM (id %q)", stateFile, st.ID)
	}
	return st, nil
}
