package sandbox

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// maxSignal is the highest number of a signal of Linux.
const maxSignal = 64

// ParseSignal returns the number of a signal that is given by its name, such as "INT" or "SIGINT", or by its number. For any
// other text, the error is errdefs.ErrInvalidArgument.
func ParseSignal(text string) (int, error) {
	name := strings.ToUpper(text)
	if n := unix.SignalNum("SIG" + strings.TrimPrefix(name, "SIG")); n != 0 {
		return int(n), nil
	}
	if n, err := strconv.ParseUint(text, 10, 8); err == nil && n >= 1 && n <= maxSignal {
		return int(n), nil
	}
	return 0, fmt.Errorf("signal %q: give a name such as TERM, or a number from 1 to %d: %w", bounded.Short(text), maxSignal, errdefs.ErrInvalidArgument)
}

// SignalName returns the name of a signal without "SIG", or its number if it has no name.
func SignalName(signal int) string {
	if name, ok := strings.CutPrefix(unix.SignalName(syscall.Signal(signal)), "SIG"); ok {
		return name
	}
	return strconv.Itoa(signal)
}
