package devices

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
)

// deviceTimeout bounds the wait for a device that the host plugs in.
const deviceTimeout = 10 * time.Second

// ErrNotYet is the error with which try asks WaitFor to call it again.
var ErrNotYet = errors.New("not yet")

// WaitFor waits until a device exists. It calls try until try returns something other than ErrNotYet, and returns that.
// try must return ErrNotYet while the device does not exist. After 10 s, or when ctx is done, WaitFor returns
// errdefs.ErrNotFound. WaitFor polls because polling needs no state. It also does not miss a device that appeared
// earlier, as listening for events would.
func WaitFor(ctx context.Context, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, deviceTimeout)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := try()
		if !errors.Is(err, ErrNotYet) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("device did not appear: %w", errdefs.ErrNotFound)
		}
	}
}
