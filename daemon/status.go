package daemon

import (
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/admin"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/serve/tlscert"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

const (
	starting      = adminv1.GetStatusResponse_DAEMON_STATE_STARTING
	recovering    = adminv1.GetStatusResponse_DAEMON_STATE_RECOVERING
	ready         = adminv1.GetStatusResponse_DAEMON_STATE_READY
	draining      = adminv1.GetStatusResponse_DAEMON_STATE_DRAINING
	stateDegraded = adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED
)

// status is the state of the daemon, with everything that it reports to administrators.
type status struct {
	cfg       config.Config
	address   string
	startedAt time.Time
	store     *store.Store
	issuer    *keys.Issuer
	manager   *sandbox.Manager
	route     host.Route
	certs     *tlscert.Source // nil if the gateway serves plain HTTP
	log       *slog.Logger

	mu                sync.Mutex
	state             adminv1.GetStatusResponse_DaemonState
	recovery          sandbox.Recovery
	containerdVersion string
	kataVersion       string
}

func (s *status) setState(state adminv1.GetStatusResponse_DaemonState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = state
}

func (s *status) setRecovery(r sandbox.Recovery, containerdVersion, kataVersion string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.recovery, s.containerdVersion, s.kataVersion = r, containerdVersion, kataVersion
}

// current returns the state and, if it is degraded, the reasons. Each admin call and each scrape calls it, so it must not
// block, even if the disk hangs.
func (s *status) current() (state adminv1.GetStatusResponse_DaemonState, reasons []string) {
	s.mu.Lock()
	state = s.state
	s.mu.Unlock()
	if err := s.store.Health(); err != nil {
		reasons = append(reasons, err.Error())
	}
	if behind := s.issuer.ClockBehind(); behind > 0 {
		reasons = append(reasons, fmt.Sprintf("the clock is %s behind the latest time that this server has used, and API keys expire by that time; "+
			"correct the clock. If it is correct now but was ahead before, run 'msb server clock accept'", behind.Round(time.Second)))
	}
	if state == ready && len(reasons) > 0 {
		state = stateDegraded
	}
	return state, reasons
}

// report returns the complete status of the daemon. It works in every state.
func (s *status) report() *adminv1.GetStatusResponse {
	s.mu.Lock()
	recovery, containerdVersion, kataVersion := s.recovery, s.containerdVersion, s.kataVersion
	s.mu.Unlock()
	state, reasons := s.current()
	keys, signing := s.issuer.Counts(), s.issuer.SigningKey()
	st := &adminv1.GetStatusResponse{
		State:               state,
		DegradedReasons:     reasons,
		Version:             s.cfg.Version,
		Pid:                 int32(os.Getpid()),
		StartedAt:           timestamppb.New(s.startedAt),
		ListenAddress:       s.address,
		AuthRequired:        !s.cfg.Dev,
		DevMode:             s.cfg.Dev,
		InstanceId:          signing.InstanceID,
		SigningKeyId:        signing.ID,
		SigningKeyCreatedAt: timestamppb.New(signing.CreatedAt),
		Keys:                &adminv1.KeyCounts{Live: int32(keys.Live), Expired: int32(keys.Expired), Revoked: int32(keys.Revoked)},
		Isolation:           isolation(s.route),
		Recovery:            &adminv1.Recovery{Adopted: int32(recovery.Adopted), Lost: int32(recovery.Lost), Removed: int32(recovery.Removed)},
		ContainerdVersion:   containerdVersion,
		KataVersion:         kataVersion,
		AuditEntries:        s.store.AuditHead().Seq,
		Warnings:            settingWarnings(s.cfg, s.address),
	}
	if warning := s.store.Space().Warning(); warning != "" {
		st.Warnings = append(st.Warnings, warning)
	}
	if ahead, wait := s.issuer.ClockAhead(); ahead > 0 {
		st.Warnings = append(st.Warnings, fmt.Sprintf("the clock was set forward by %s; if it stays there, API keys expire by the new time in %s. "+
			"To use the new time now, run 'msb server clock accept'", ahead.Round(time.Second), max(time.Second, wait.Round(time.Second))))
	}
	most, files := gateway.LimitConnections(s.cfg.MaxConnections)
	if warning := connectionWarning(s.cfg.MaxConnections, most, files); warning != "" {
		st.Warnings = append(st.Warnings, warning)
	}
	if err := s.store.AuditProblem(); err != nil {
		st.Warnings = append(st.Warnings, rpcerr.Message(err))
	}
	if kataVersion != "" { // the versions are known only after the recovery
		for _, warning := range []string{s.route.KataWarning(kataVersion), host.ContainerdWarning(containerdVersion)} {
			if warning != "" {
				st.Warnings = append(st.Warnings, warning)
			}
		}
	}
	if s.certs != nil {
		cert := s.certs.Status(time.Now())
		st.Tls = &adminv1.TLS{Source: cert.Source, Names: cert.Names, ClientCertificates: cert.ClientCertificates}
		if !cert.NotAfter.IsZero() {
			st.Tls.NotAfter = timestamppb.New(cert.NotAfter)
		}
		st.Warnings = append(st.Warnings, cert.Warnings...)
	}
	st.Capacity, st.Pool = s.capacity(), admin.PoolSummary(s.manager.PoolStatus())
	for _, rec := range s.manager.List("") {
		switch rec.State {
		case sandbox.Running:
			st.SandboxesRunning++
		case sandbox.Failed:
			st.SandboxesFailed++
		}
	}
	return st
}

// capacity returns how much room the server has for sandboxes.
func (s *status) capacity() *adminv1.Capacity {
	used, room := s.manager.InUse(), s.manager.Room()
	c := &adminv1.Capacity{
		Sandboxes: int32(used.Sandboxes), MaxSandboxes: int32(s.cfg.TotalSandboxes),
		MemoryMib: int64(used.MemoryMiB), MaxMemoryMib: int64(s.cfg.TotalMemoryMiB),
		StartsInProgress: int32(room.Booting), StartsWaiting: int32(room.Waiting),
	}
	if room.MemoryBytes != nil {
		c.AvailableMemoryMib = new(int64(*room.MemoryBytes >> 20))
	}
	if space := s.store.Space(); space.TotalBytes > 0 { // measured
		c.FreeDiskMib = new(int64(space.FreeBytes >> 20))
	}
	return c
}

// settingWarnings returns warnings about settings that make the server less secure. They are logged at each start and shown
// in the status.
func settingWarnings(cfg config.Config, address string) (warnings []string) {
	if cfg.Dev {
		warnings = append(warnings, fmt.Sprintf("dev mode: everyone who can connect to %s can do everything without an API key; never use it in production", address))
	}
	if cfg.InsecureBehindProxy && !cfg.TLS() {
		warnings = append(warnings, fmt.Sprintf("insecure_behind_proxy: %s accepts API keys in plain text; "+
			"make sure that only a proxy with TLS can connect to it, over a trusted network", address))
	}
	return warnings
}

// connectionWarning returns a warning if the limit of open files is too low for the configured number of connections,
// which is want. The server then has at most most connections.
func connectionWarning(want, most int, files uint64) string {
	if most >= want {
		return ""
	}
	return fmt.Sprintf("the limit of %d open files allows only %d connections, although max_connections is %d: run msbd as the systemd service, "+
		"or raise the limit (ulimit -n) before the start", files, most, want)
}

func isolation(r host.Route) *adminv1.Isolation {
	return &adminv1.Isolation{
		Hypervisor: r.Hypervisor, HypervisorReason: r.HypervisorReason,
		Accelerator: r.Accelerator, Reason: r.AcceleratorReason,
		Advice: r.Advice,
	}
}
