package control

import (
	"context"
	"log/slog"
	"time"
)

// interval is the time between two checks of a guest's clock.
const interval = 30 * time.Second

// Follow keeps the clock of a guest the same as the host's until ctx ends. It checks the clock at once and then every 30
// seconds. path is the Unix socket of the guest's control port. Follow connects for each check, because only one client at
// a time can use the socket. It logs when the checks begin to fail and when they succeed again.
func Follow(ctx context.Context, path string, log *slog.Logger) {
	follow(ctx, log, func() error {
		c, err := Dial(ctx, path)
		if err != nil {
			return err
		}
		defer c.Close()
		return c.SyncClock(ctx)
	})
}

// follow is Follow with the function that checks the clock.
func follow(ctx context.Context, log *slog.Logger, check func() error) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	failing := false
	for {
		err := check()
		if ctx.Err() != nil {
			return
		}
		switch {
		case err != nil && !failing:
			log.Warn("could not check the guest's clock", "err", err)
		case err == nil && failing:
			log.Info("the guest's clock is checked again")
		}
		failing = err != nil
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
