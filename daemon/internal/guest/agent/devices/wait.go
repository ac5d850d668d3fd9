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

// ErrNotYet makes WaitFor try again.
var ErrNotYet = errors.New("not yet")

// WaitFor calls try until it returns nil or an error other than ErrNotYet, which try returns while the device does not
// exist. After 10 s, or when ctx is done, WaitFor returns an error of class errdefs.ErrNotFound. It polls because that
// needs no state and, unlike listening for events, does not miss a device that appeared earlier.
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
