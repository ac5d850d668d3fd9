package daemontest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/serve/admin"
	"github.com/msbd/msbd/daemon/internal/sys/config"
	"github.com/msbd/msbd/daemon/internal/sys/peer"
)

// Trouble names a server that the real parts are not by themselves on the host of a test: each is a double of one part
// of it, and the rest is real. The empty Trouble is none.
type Trouble string

// TroubleEnv is the environment variable by which Main gets a Trouble.
const TroubleEnv = "DAEMONTEST_TROUBLE"

const (
	Degraded  Trouble = "degraded"   // it says that its disk is full, and more that its status can say
	Denied    Trouble = "denied"     // it takes each caller for a user who may not administer it
	CutBackup Trouble = "cut-backup" // it fails in the middle of a backup
	OnKVM     Trouble = "kvm"        // it began when its host had KVM
	// Old is a server of the time before the management of keys. It knows no names and scopes of keys, takes the last of
	// several namespaces, has no calls but CreateKey, GetStatus and Shutdown, and cannot examine its host.
	Old Trouble = "old"
	// BadHost only examines its host, where it finds a problem.
	BadHost Trouble = "bad-host"
)

func (t Trouble) backups(real admin.Backups) admin.Backups {
	if t == CutBackup {
		return cutBackups{real}
	}
	return real
}

// cutBackups breaks off each archive.
type cutBackups struct{ admin.Backups }

// Write implements admin.Backups.
func (b cutBackups) Write(ctx context.Context, w io.Writer, by uint32) error {
	return b.Backups.Write(ctx, &cutWriter{w, 1000}, by)
}

// cutWriter takes so many bytes.
type cutWriter struct {
	io.Writer
	left int
}

func (w *cutWriter) Write(p []byte) (int, error) {
	if len(p) > w.left {
		return 0, errors.New("the disk failed")
	}
	w.left -= len(p)
	return w.Writer.Write(p)
}

func (t Trouble) peerOf(ctx context.Context) (peer.Peer, bool) {
	p, ok := peer.FromContext(ctx)
	if t == Denied {
		p.UID, p.Groups = uint32(os.Geteuid())+1, nil
	}
	return p, ok
}

// describe changes what the status says.
func (t Trouble) describe(st *adminv1.GetStatusResponse) {
	switch t {
	case Degraded:
		st.Warnings = []string{"the certificate expires soon"}
		st.Tls = &adminv1.TLS{
			Source: "files", Names: []string{"a.example", "b.example"}, ClientCertificates: true,
			NotAfter: timestamppb.New(time.Date(2126, 1, 2, 3, 4, 5, 0, time.UTC)),
		}
	case OnKVM:
		st.Isolation = &adminv1.Isolation{Hypervisor: host.Kata, Accelerator: host.KVM}
	case Old:
		st.Isolation = &adminv1.Isolation{Accelerator: host.TCG}
	}
}

// serveAdmin serves the admin socket until ctx ends.
func (s *Server) serveAdmin(ctx context.Context) error {
	if s.trouble != Old {
		return s.admin().Serve(ctx, s.socket)
	}
	g := grpc.NewServer(grpc.Creds(peer.Credentials()))
	adminv1.RegisterAdminServiceServer(g, oldServer{real: s.admin()})
	defer context.AfterFunc(ctx, g.GracefulStop)()
	return g.Serve(s.socket)
}

type oldServer struct {
	adminv1.UnimplementedAdminServiceServer
	real *admin.Server
}

// GetStatus implements adminv1.AdminServiceServer.
func (s oldServer) GetStatus(ctx context.Context, req *adminv1.GetStatusRequest) (*adminv1.GetStatusResponse, error) {
	return s.real.GetStatus(ctx, req)
}

// CreateKey implements adminv1.AdminServiceServer.
func (s oldServer) CreateKey(ctx context.Context, req *adminv1.CreateKeyRequest) (*adminv1.CreateKeyResponse, error) {
	old := &adminv1.CreateKeyRequest{Expire: req.GetExpire()}
	if ns := req.GetNamespaces(); len(ns) > 0 {
		old.Namespaces = ns[len(ns)-1:]
	}
	return s.real.CreateKey(ctx, old)
}

// Shutdown implements adminv1.AdminServiceServer.
func (s oldServer) Shutdown(ctx context.Context, req *adminv1.ShutdownRequest) (*adminv1.ShutdownResponse, error) {
	return s.real.Shutdown(ctx, req)
}

// route is what every server here says that it runs on.
var route = host.Route{
	Hypervisor: host.Builtin, HypervisorReason: "Kata's own driver needs KVM",
	Accelerator: host.TCG, AcceleratorReason: "no /dev/kvm", Advice: []string{"modprobe kvm_amd"},
}

// examine is a report of a host that is none, since the real one differs from machine to machine: it lacks KVM, for a
// reason that a terminal should not be commanded by.
func examine(cfg config.Config, trouble Trouble) host.Report {
	r := host.Report{Status: host.Warning, Isolation: &route, Checks: []host.Check{
		{Name: "settings", Status: host.OK, Detail: fmt.Sprintf("run %s, state %s", cfg.RunDir, cfg.StateDir)},
		{Name: "KVM", Status: host.Warning, Detail: "no \x1b[2J/dev/kvm", Remedy: "modprobe kvm_amd"},
	}}
	if trouble == BadHost {
		r.Status, r.Isolation = host.Problem, nil
		r.Checks = append(r.Checks, host.Check{Name: "address", Status: host.Problem, Detail: cfg.Listen + " is in use", Remedy: "--port"})
	}
	return r
}
