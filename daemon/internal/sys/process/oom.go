package process

import (
	"fmt"
	"os"
	"strconv"
)

// protectedOOMScore is the oom_score_adj of a protected process. When the kernel chooses what to kill, it then assumes that
// the process uses less memory than it does, by half of the host's memory.
const protectedOOMScore = -500

// ProtectFromOOM makes the kernel kill other processes first when memory runs out, such as those of the sandboxes that use
// it. Child processes inherit this until ExposeToOOM is called for them. It does nothing if a score is already set, for
// example by systemd. It needs CAP_SYS_RESOURCE.
func ProtectFromOOM() error {
	const file = "/proc/self/oom_score_adj"
	score, err := os.ReadFile(file)
	if err == nil && string(score) == "0\n" {
		err = os.WriteFile(file, []byte(strconv.Itoa(protectedOOMScore)), 0)
	}
	if err != nil {
		return fmt.Errorf("protect this process when memory runs out: %w", err)
	}
	return nil
}

// ExposeToOOM gives a child process the default score again.
func ExposeToOOM(pid int) error {
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("0"), 0); err != nil {
		return fmt.Errorf("reset the OOM score of process %d: %w", pid, err)
	}
	return nil
}
