package container

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestCapabilityMask(t *testing.T) {
	if got, err := capabilityMask([]string{"CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"}); err != nil || got != 1|1<<unix.CAP_SYS_ADMIN|1<<unix.CAP_CHECKPOINT_RESTORE {
		t.Errorf("capabilityMask = %#x, %v", got, err)
	}
	if _, err := capabilityMask([]string{"cap_chown"}); err == nil {
		t.Error("capabilityMask accepted the unknown name cap_chown")
	}
	if len(capabilityNames) != unix.CAP_LAST_CAP+1 {
		t.Errorf("capabilityNames has %d names, the kernel has %d capabilities", len(capabilityNames), unix.CAP_LAST_CAP+1)
	}
}
