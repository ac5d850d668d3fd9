package devices

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
)

// deviceLimit bounds each wait for a device of the host's.
const deviceLimit = 10 * time.Second

// ErrNotYet makes WaitFor try again.
var ErrNotYet = errors.New("not yet")

// WaitFor calls try until it returns something other than ErrNotYet, that is, until the host's device
// is there. Polling sysfs needs no state, and unlike a listener for events it does not miss a device
// that came earlier.
func WaitFor(ctx context.Context, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, deviceLimit)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := try()
		if !errors.Is(err, ErrNotYet) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("did not appear: %w", errdefs.ErrNotFound)
		}
	}
}
