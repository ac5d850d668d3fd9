// Package daemon wires msbd: it makes the rooms, joins them, and takes them down in reverse. It is
// the only place where adapters meet.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"github.com/msbd/msbd/daemon/internal/admin"
	"github.com/msbd/msbd/daemon/internal/config"
	"github.com/msbd/msbd/daemon/internal/gateway"
	"github.com/msbd/msbd/daemon/internal/image"
	"github.com/msbd/msbd/daemon/internal/localsock"
	"github.com/msbd/msbd/daemon/internal/microvm"
	"github.com/msbd/msbd/daemon/internal/portal"
	"github.com/msbd/msbd/daemon/internal/sandbox"
	"github.com/msbd/msbd/daemon/internal/store"
	"github.com/msbd/msbd/daemon/internal/token"
	"github.com/msbd/msbd/daemon/internal/vmm"
)

// startTimeout bounds a sandbox's start. Emulated boots take seconds, and many at once take turns.
const startTimeout = 2 * time.Minute

// Run serves until ctx ends or an administrator asks it to stop, and returns nil then. Sandboxes
// run on unless the administrator asked otherwise.
func Run(ctx context.Context, cfg config.Config, log *slog.Logger) (err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()

	// The doors come first: a second daemon, or a port in use, is found out before anything is touched.
	state, err := store.Open(cfg.StateDir)
	if err != nil {
		return err
	}
	defer closeInto(&err, state.Close)
	http, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return fmt.Errorf("%w: choose another with --port, or end what uses it", err)
	}
	defer http.Close()
	socket, err := localsock.Listen(cfg.SocketPath())
	if err != nil {
		return err
	}
	defer socket.Close()

	issuer, verifier, err := token.Open(token.Options{
		KeyringPath: filepath.Join(cfg.StateDir, "keyring.json"), Store: state, Reset: cfg.ResetKey, Log: log,
	})
	if err != nil {
		return err
	}

	vms, err := vmm.New(vmm.Config{
		Socket:      filepath.Join(cfg.RunDir, "hypervisor.sock"),
		Dir:         filepath.Join(cfg.RunDir, "vm"),
		QEMU:        cfg.QEMU,
		Virtiofsd:   cfg.Virtiofsd,
		Kernel:      filepath.Join(cfg.LibDir, "guest", "vmlinux"),
		Initrd:      filepath.Join(cfg.LibDir, "guest", "initrd.img"),
		Accelerator: cfg.Accelerator,
		// Beyond what the sandbox may use, so that its limit is what it meets first.
		MemoryHeadroomMiB: 128,
		Log:               log,
	})
	if err != nil {
		return err
	}

	private := &microvm.Containerd{
		Binary:  filepath.Join(cfg.LibDir, "containerd"),
		Root:    filepath.Join(cfg.StateDir, "containerd"),
		State:   filepath.Join(cfg.RunDir, "containerd"),
		Address: filepath.Join(cfg.RunDir, "containerd.sock"),
		Log:     log,
	}
	address := cfg.Containerd
	if address == "" {
		address = private.Address
	}
	client, err := microvm.Dial(address)
	if err != nil {
		return err
	}
	defer client.Close()
	images := image.NewStore(client, microvm.Namespace, microvm.Snapshotter)
	runtime, err := microvm.New(microvm.Config{
		Client:           client,
		Address:          address,
		Shim:             filepath.Join(cfg.LibDir, "containerd-shim-kata-v2"),
		RunDir:           cfg.RunDir,
		HypervisorSocket: filepath.Join(cfg.RunDir, "hypervisor.sock"),
		VMs:              microVMSet{vms},
		Image:            images.Resolve,
		Log:              log,
	})
	if err != nil {
		return err
	}
	defer runtime.Close()

	manager := sandbox.NewManager(sandbox.Options{
		Store:   state,
		Runtime: runtime,
		Connect: func(ctx context.Context, stream io.ReadWriteCloser) (sandbox.Portal, error) {
			return portal.New(ctx, stream)
		},
		Defaults:     sandbox.Config{Image: cfg.DefaultImage, CPUs: cfg.DefaultCPUs, MemoryMiB: cfg.DefaultMemoryMiB},
		MaxCPUs:      cfg.MaxCPUs,
		MaxMemoryMiB: cfg.MaxMemoryMiB,
		StartTimeout: startTimeout,
		MaxRunTime:   cfg.MaxRunTime,
		Log:          log,
	})
	defer manager.Close()

	life := newLife(cfg, http.Addr().String(), issuer, manager, vms, log)
	office := admin.New(admin.Options{
		Keys:        issuer,
		Sandboxes:   manager,
		Images:      adminImages{images},
		Status:      life.status,
		Shutdown:    stop,
		Credentials: localsock.Credentials(),
		PeerOf: func(ctx context.Context) (admin.Peer, bool) {
			peer, ok := localsock.PeerFromContext(ctx)
			return admin.Peer{UID: peer.UID, GID: peer.GID}, ok
		},
		Group: localsock.Group,
		Log:   log,
	})
	door, err := gateway.New(gateway.Options{Verifier: verifier, Sandboxes: manager, Dev: cfg.Dev, Log: log})
	if err != nil {
		return err
	}

	// From here on everything runs side by side; the first to fail, or a stop, ends all.
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return office.Serve(ctx, socket) })
	g.Go(func() error { return vms.Serve(ctx) })
	g.Go(func() error { return door.Serve(ctx, http) })
	g.Go(func() error {
		if cfg.Containerd == "" {
			if err := private.Start(ctx); err != nil {
				return err
			}
		}
		life.enter(recovering)
		if err := recoverAll(ctx, life, vms, manager, runtime); err != nil {
			return err
		}
		life.enter(ready)
		log.Info("ready", "address", http.Addr().String(), "dev", cfg.Dev, "accelerator", life.accelerator())
		_, err := systemd.SdNotify(false, systemd.SdNotifyReady)
		return err
	})
	g.Go(func() error {
		<-ctx.Done()
		life.enter(draining)
		systemd.SdNotify(false, systemd.SdNotifyStopping)
		return nil
	})
	err = g.Wait()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil
	}
	if cfg.Containerd == "" && microVMs(manager) == 0 {
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		err = errors.Join(err, private.Stop(ending))
	}
	return err
}

// recoverAll brings what an earlier daemon left, or what died meanwhile, in order.
func recoverAll(ctx context.Context, life *life, vms *vmm.Service, manager *sandbox.Manager, runtime *microvm.Runtime) error {
	version, err := runtime.Client.Version(ctx)
	if err != nil {
		return fmt.Errorf("ask containerd for its version: %w", err)
	}
	kata, err := runtime.KataVersion(ctx)
	if err != nil {
		return err
	}
	found, err := vms.Recover(ctx)
	if err != nil {
		// The sandbox's own recovery tries again, and one that cannot be removed keeps no other from running.
		life.log.Error("recover microVMs", "err", err)
	}
	life.log.Info("recovered microVMs", "adopted", len(found.Adopted), "removed", len(found.Removed))
	recovery, err := manager.Recover(ctx)
	if err != nil {
		return err
	}
	life.recovered(recovery, version.Version, kata)
	return nil
}

// microVMs counts the sandboxes that hold one.
func microVMs(manager *sandbox.Manager) (n int) {
	for _, rec := range manager.List("") {
		if rec.State != sandbox.Failed {
			n++
		}
	}
	return n
}

// adminImages and microVMSet say what one room knows in the words of another.
type adminImages struct{ *image.Store }

func (s adminImages) Import(ctx context.Context, path string) ([]admin.Image, error) {
	return toAdmin(s.Store.Import(ctx, path))
}

func (s adminImages) List(ctx context.Context) ([]admin.Image, error) {
	return toAdmin(s.Store.List(ctx))
}

func toAdmin(images []image.Image, err error) ([]admin.Image, error) {
	var out []admin.Image
	for _, img := range images {
		out = append(out, admin.Image(img))
	}
	return out, err
}

type microVMSet struct{ *vmm.Service }

func (s microVMSet) IDs() []string {
	var ids []string
	for _, vm := range s.VMs() {
		ids = append(ids, vm.ID)
	}
	return ids
}

func closeInto(err *error, close func() error) { *err = errors.Join(*err, close()) }
