package daemon

import (
	"log/slog"
	"os"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/config"
	"github.com/msbd/msbd/daemon/internal/sandbox"
	"github.com/msbd/msbd/daemon/internal/token"
	"github.com/msbd/msbd/daemon/internal/vmm"
)

const (
	starting   = adminv1.GetStatusResponse_DAEMON_STATE_STARTING
	recovering = adminv1.GetStatusResponse_DAEMON_STATE_RECOVERING
	ready      = adminv1.GetStatusResponse_DAEMON_STATE_READY
	draining   = adminv1.GetStatusResponse_DAEMON_STATE_DRAINING
)

// life is where the daemon is in its life, and what its status says.
type life struct {
	cfg     config.Config
	address string
	began   time.Time
	issuer  *token.Issuer
	manager *sandbox.Manager
	vms     *vmm.Service
	log     *slog.Logger

	mu                sync.Mutex
	state             adminv1.GetStatusResponse_DaemonState
	recovery          sandbox.Recovery
	containerdVersion string
	kataVersion       string
}

func newLife(cfg config.Config, address string, issuer *token.Issuer, manager *sandbox.Manager, vms *vmm.Service, log *slog.Logger) *life {
	return &life{cfg: cfg, address: address, began: time.Now(), issuer: issuer, manager: manager, vms: vms, log: log, state: starting}
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

func (l *life) accelerator() string {
	name, _ := l.vms.Accelerator()
	return name
}

// status answers in every state.
func (l *life) status() *adminv1.GetStatusResponse {
	l.mu.Lock()
	state, recovery, containerdVersion, kataVersion := l.state, l.recovery, l.containerdVersion, l.kataVersion
	l.mu.Unlock()
	keys, signing := l.issuer.Counts(), l.issuer.SigningKey()
	accelerator, reason := l.vms.Accelerator()
	st := &adminv1.GetStatusResponse{
		State:               state,
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
		Isolation:           &adminv1.Isolation{Accelerator: accelerator, Reason: reason},
		Recovery:            &adminv1.Recovery{Adopted: int32(recovery.Adopted), Lost: int32(recovery.Lost), Removed: int32(recovery.Removed)},
		ContainerdVersion:   containerdVersion,
		KataVersion:         kataVersion,
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
