package backend

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// Real microVMs keep the contract that the fake of other tests keeps.
func TestRuntimeContract(t *testing.T) {
	cfg := newConfig(t)
	b, err := New(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatalf("%v: run make build guest images", err)
	}
	defer b.Close()
	ctx, cancel := context.WithCancel(t.Context())
	err = b.Run(ctx, func(ctx context.Context) error {
		defer cancel()
		images, err := b.Images.Import(ctx, filepath.Join(cfg.LibDir, "images", "python.tar"))
		if err != nil {
			return err
		}
		t.Run("contract", func(t *testing.T) {
			sandboxtest.TestRuntime(t, sandboxtest.RuntimeUnderTest{
				Runtime: b.Runtime, Image: images[0].Name, Patience: time.Minute, Kill: b.killQEMU,
			})
		})
		return nil
	})
	if err != nil {
		t.Errorf("Run: %v", err)
	}
	if err := b.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// killQEMU ends a microVM as a crash of QEMU would.
func (b *Backend) killQEMU(id string) error {
	for _, vm := range b.vms.VMs() {
		if vm.ID != id {
			continue
		}
		qemu, err := process.Open(vm.QEMU)
		if err != nil || qemu == nil {
			return errors.Join(errors.New("find QEMU"), err)
		}
		defer qemu.Close()
		return qemu.Kill(context.Background())
	}
	return errors.New("there is no such VM")
}
