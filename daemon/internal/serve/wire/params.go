package wire

import (
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// Seconds converts a param or member, given in seconds. A time that does not fit a Duration becomes the longest one, because
// some clients send nanoseconds. If it is negative, the error is errdefs.ErrInvalidArgument. why completes the sentence "omit it
// …" of the error.
func Seconds(name string, seconds float64, why string) (time.Duration, error) {
	switch {
	case seconds < 0:
		return 0, fmt.Errorf("%s %g is negative; give seconds, or omit it %s: %w", name, seconds, why, errdefs.ErrInvalidArgument)
	case seconds >= math.MaxInt64/float64(time.Second):
		return math.MaxInt64, nil
	case seconds > 0:
		return max(1, time.Duration(seconds*float64(time.Second))), nil
	default:
		return 0, nil
	}
}

// Mode converts the permission bits of a file, given in octal. The error is errdefs.ErrInvalidArgument.
func Mode(text string) (*uint32, error) {
	mode, err := strconv.ParseUint(text, 8, 12)
	if err != nil {
		return nil, fmt.Errorf("mode %q: give the permissions in octal, such as 0644: %w", bounded.Short(text), errdefs.ErrInvalidArgument)
	}
	return new(uint32(mode)), nil
}
