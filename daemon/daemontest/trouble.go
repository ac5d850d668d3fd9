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

// Trouble is a kind of server that a test cannot get from the real parts on its host. Each Trouble replaces one part by a
// fake; the other parts are real. The empty Trouble replaces nothing.
type Trouble string

// TroubleEnv is the environment variable from which Main reads the Trouble.
const TroubleEnv = "DAEMONTEST_TROUBLE"

const (
	Degraded  Trouble = "degraded"   // the server is degraded because of a full disk, and its status has warnings and TLS
	Denied    Trouble = "denied"     // the server refuses every caller of the admin socket
	CutBackup Trouble = "cut-backup" // every backup fails in the middle
	OnKVM     Trouble = "kvm"        // the server reports that it started on a host with KVM
	// Old is a server from before keys could be managed. It has no names and scopes of keys, uses only the last of several
	// namespaces, has no calls except CreateKey, GetStatus and Shutdown, and no doctor.
	Old Trouble = "old"
	// ClockAhead is a server whose clock was ahead by a day before it was started.
	ClockAhead Trouble = "clock-ahead"
	// BadHost makes the doctor report a problem of the host.
	BadHost Trouble = "bad-host"
)

func (t Trouble) backups(real admin.Backups) admin.Backups {
	if t == CutBackup {
		return failingBackups{real}
	}
	return real
}

// failingBackups is a Backups that fails in the middle of each archive.
type failingBackups struct{ admin.Backups }

// Write implements admin.Backups.
func (b failingBackups) Write(ctx context.Context, w io.Writer, by uint32) error {
	return b.Backups.Write(ctx, &failingWriter{w, 1000}, by)
}

// failingWriter fails before it exceeds a number of bytes.
type failingWriter struct {
	io.Writer
	remaining int
}

func (w *failingWriter) Write(p []byte) (int, error) {
	if len(p) > w.remaining {
		return 0, errors.New("the disk failed")
	}
	w.remaining -= len(p)
	return w.Writer.Write(p)
}

func (t Trouble) peerOf(ctx context.Context) (peer.Peer, bool) {
	p, ok := peer.FromContext(ctx)
	if t == Denied {
		p.UID, p.Groups = uint32(os.Geteuid())+1, nil
	}
	return p, ok
}

// describe adjusts the status.
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
		st.Isolation, st.Pool = &adminv1.Isolation{Accelerator: host.TCG}, nil
	}
}

// serveAdmin serves the admin socket until ctx is canceled.
func (s *Server) serveAdmin(ctx context.Context) error {
	if s.trouble != Old {
		return s.admin().Serve(ctx, s.socket)
	}
	g := grpc.NewServer(grpc.Creds(peer.Credentials()))
	adminv1.RegisterAdminServiceServer(g, oldServer{real: s.admin()})
	defer context.AfterFunc(ctx, g.GracefulStop)()
	return g.Serve(s.socket)
}

// oldServer is the admin server of an Old server.
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

// route is the route that every server reports.
var route = host.Route{
	Hypervisor: host.Builtin, HypervisorReason: "Kata's own driver needs KVM",
	Accelerator: host.TCG, AcceleratorReason: "no /dev/kvm", Advice: []string{"modprobe kvm_amd"},
}

// examine returns the report of a fake host, because a real report differs from machine to machine. The host lacks KVM, and
// the detail contains a terminal escape sequence, which clients must not print.
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
