package store

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// probeInterval is how often Run probes the store.
const probeInterval = 2 * time.Second

// Health returns why the store cannot write, or why its disk has too little free space, or nil. It reports what the last
// write and the last Probe found. It does not access the disk, so it does not block even if the disk hangs.
func (s *Store) Health() error { return errors.Join(s.writes.health(), s.disk.health()) }

// Probe finds out whether the store can write again if it could not, measures the free space, and reserves disk space for
// the time when the disk is full. It may block as long as the disk does.
func (s *Store) Probe() error {
	s.writes.probe()
	return s.disk.probe()
}

// Run probes the store at intervals, and logs changes of its Health, until ctx ends.
func (s *Store) Run(ctx context.Context, log *slog.Logger) error {
	healthy := true
	for tick := time.NewTicker(probeInterval); ; {
		err := errors.Join(s.Probe(), s.Health())
		switch {
		case err != nil && healthy:
			log.Error("the server is degraded", "err", err)
		case err == nil && !healthy:
			log.Info("the server is no longer degraded: its disk can be written and has enough free space")
		}
		healthy = err == nil
		select {
		case <-ctx.Done():
			tick.Stop()
			return nil
		case <-tick.C:
		}
	}
}
