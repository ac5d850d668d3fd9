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
	"github.com/msbd/msbd/daemon/internal/serve/tlscert"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

const (
	starting   = adminv1.GetStatusResponse_DAEMON_STATE_STARTING
	recovering = adminv1.GetStatusResponse_DAEMON_STATE_RECOVERING
	ready      = adminv1.GetStatusResponse_DAEMON_STATE_READY
	draining   = adminv1.GetStatusResponse_DAEMON_STATE_DRAINING
	isDegraded = adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED
)

// life is where the daemon is in its life, and what its status says.
type life struct {
	cfg     config.Config
	address string
	began   time.Time
	store   *store.Store
	issuer  *keys.Issuer
	manager *sandbox.Manager
	route   host.Route
	certs   *tlscert.Source // nil: the gateway speaks plain HTTP
	log     *slog.Logger

	mu                sync.Mutex
	state             adminv1.GetStatusResponse_DaemonState
	recovery          sandbox.Recovery
	containerdVersion string
	kataVersion       string
}

func (l *life) enter(s adminv1.GetStatusResponse_DaemonState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state = s
}

func (l *life) recovered(r sandbox.Recovery, containerdVersion, kataVersion string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recovery, l.containerdVersion, l.kataVersion = r, containerdVersion, kataVersion
}

// now is the state, and why it is degraded if it is. It is cheap: each admin call asks.
func (l *life) now() (state adminv1.GetStatusResponse_DaemonState, reasons []string) {
	l.mu.Lock()
	state = l.state
	l.mu.Unlock()
	if err := l.store.Health(); err != nil {
		reasons = append(reasons, err.Error())
	}
	if behind := l.issuer.ClockBehind(); behind > 0 {
		reasons = append(reasons, fmt.Sprintf("the clock is %s behind the latest time that this server has seen, by which API keys expire: "+
			"set the clock right; if it is right and was wrong before, 'msb server reset' makes a new beginning", behind.Round(time.Second)))
	}
	if state == ready && len(reasons) > 0 {
		state = isDegraded
	}
	return state, reasons
}

// status answers in every state.
func (l *life) status() *adminv1.GetStatusResponse {
	l.mu.Lock()
	recovery, containerdVersion, kataVersion := l.recovery, l.containerdVersion, l.kataVersion
	l.mu.Unlock()
	state, reasons := l.now()
	keys, signing := l.issuer.Counts(), l.issuer.SigningKey()
	st := &adminv1.GetStatusResponse{
		State:               state,
		DegradedReasons:     reasons,
		Version:             l.cfg.Version,
		Pid:                 int32(os.Getpid()),
		StartedAt:           timestamppb.New(l.began),
		ListenAddress:       l.address,
		AuthRequired:        !l.cfg.Dev,
		DevMode:             l.cfg.Dev,
		InstanceId:          signing.InstanceID,
		SigningKeyId:        signing.ID,
		SigningKeyCreatedAt: timestamppb.New(signing.CreatedAt),
		Keys:                &adminv1.KeyCounts{Live: int32(keys.Live), Expired: int32(keys.Expired), Revoked: int32(keys.Revoked)},
		Isolation:           isolation(l.route),
		Recovery:            &adminv1.Recovery{Adopted: int32(recovery.Adopted), Lost: int32(recovery.Lost), Removed: int32(recovery.Removed)},
		ContainerdVersion:   containerdVersion,
		KataVersion:         kataVersion,
		AuditEntries:        l.store.AuditHead().Seq,
		Warnings:            openings(l.cfg, l.address),
	}
	if err := l.store.AuditProblem(); err != nil {
		st.Warnings = append(st.Warnings, err.Error())
	}
	if kataVersion != "" { // known since the recovery
		for _, warning := range []string{l.route.KataWarning(kataVersion), host.ContainerdWarning(containerdVersion)} {
			if warning != "" {
				st.Warnings = append(st.Warnings, warning)
			}
		}
	}
	if l.certs != nil {
		cert := l.certs.Status(time.Now())
		st.Tls = &adminv1.TLS{Source: cert.Source, Names: cert.Names, ClientCertificates: cert.ClientCertificates}
		if !cert.NotAfter.IsZero() {
			st.Tls.NotAfter = timestamppb.New(cert.NotAfter)
		}
		st.Warnings = append(st.Warnings, cert.Warnings...)
	}
	for _, rec := range l.manager.List("") {
		switch rec.State {
		case sandbox.Running:
			st.SandboxesRunning++
		case sandbox.Failed:
			st.SandboxesFailed++
		}
	}
	return st
}

// openings are the settings by which the server lets in what it otherwise would not. They are said at each
// start and in the status.
func openings(cfg config.Config, address string) (warnings []string) {
	if cfg.Dev {
		warnings = append(warnings, fmt.Sprintf("dev mode: whoever reaches %s can do everything, without an API key: never use it in production", address))
	}
	if cfg.InsecureBehindProxy && !cfg.TLS() {
		warnings = append(warnings, fmt.Sprintf("insecure_behind_proxy: %s takes API keys in plain text: "+
			"see that only a proxy with TLS reaches it, over a network that nobody else reads", address))
	}
	return warnings
}

func isolation(r host.Route) *adminv1.Isolation {
	return &adminv1.Isolation{
		Hypervisor: r.Hypervisor, HypervisorReason: r.HypervisorReason,
		Accelerator: r.Accelerator, Reason: r.AcceleratorReason,
		Advice: r.Advice,
	}
}
