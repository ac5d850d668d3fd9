package store

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/msbd/msbd/api/audit"
)

// probeInterval is how often Run probes the store.
const probeInterval = 2 * time.Second

// lastSettle is how long Run waits at its end for another writer, before it settles the audit log.
const lastSettle = time.Second

// Health returns why the store cannot write, or why its disk has too little free space, or nil. It reports what the last
// write and the last Probe found. It does not access the disk, so it does not block even if the disk hangs.
func (s *Store) Health() error { return errors.Join(s.writes.health(), s.disk.health()) }

// Probe finds out whether the store can write again if it could not, measures the free space, and reserves disk space for
// the time when the disk is full. It may block as long as the disk does.
func (s *Store) Probe() error {
	s.writes.probe()
	return s.disk.probe()
}

// Run probes the store and settles the audit log at intervals until ctx ends. It seals the log's file when it has
// segmentSize bytes, unless segmentSize is 0, and logs changes of Health and new problems of the audit log. It ends even
// if another writer waits for a disk that hangs.
func (s *Store) Run(ctx context.Context, segmentSize int64, log *slog.Logger) error {
	healthy, problem := true, ""
	for tick := time.NewTicker(probeInterval); ; {
		err := errors.Join(s.Probe(), s.Health())
		switch {
		case err != nil && healthy:
			log.Error("the server is degraded", "err", err)
		case err == nil && !healthy:
			log.Info("the server is no longer degraded: its disk can be written and has enough free space")
		}
		healthy = err == nil
		if healthy {
			if err := errors.Join(s.sealLarge(ctx, segmentSize), s.settle(ctx)); err != nil && ctx.Err() == nil {
				log.Error("could not maintain the audit log", "err", err)
			}
		}
		last := problem
		if problem = ""; s.AuditProblem() != nil {
			problem = s.AuditProblem().Error()
		}
		if problem != "" && problem != last {
			log.Error("the audit log has a problem", "err", problem)
		}
		select {
		case <-ctx.Done():
			tick.Stop()
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastSettle)
			defer cancel()
			_ = s.settle(ctx) // a failure costs nothing: the next start reads the outbox
			return nil
		case <-tick.C:
		}
	}
}

// settle makes the last lines of the audit log durable in its file, so that a change of the file is detected even if msbd
// does not run. It returns the error of ctx if that ends while another writer commits.
func (s *Store) settle(ctx context.Context) error {
	if err := s.writes.acquire(ctx); err != nil {
		return err
	}
	defer s.writes.end()
	if err := s.writes.stopReason(); err != nil {
		return err
	}
	return s.log.settle()
}

// sealLarge seals the audit log's file if it has at least size bytes. It does nothing if size is 0.
func (s *Store) sealLarge(ctx context.Context, size int64) error {
	s.log.mu.Lock()
	end := s.log.published.end
	s.log.mu.Unlock()
	if size == 0 || end.Size < size {
		return nil
	}
	_, err := s.SealAudit(ctx, audit.ActorServer)
	return err
}
