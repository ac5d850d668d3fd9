package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// Real microVMs satisfy the same contract as the fake runtime that other tests use.
func TestRuntimeContract(t *testing.T) {
	cfg := newConfig(t)
	b, err := New(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatalf("%v: run make build guest images", err)
	}
	defer b.Close()
	ctx, cancel := context.WithCancel(t.Context())
	err = b.Run(ctx, admitAll, func(ctx context.Context) error {
		defer cancel()
		images, err := b.Images.Import(ctx, filepath.Join(cfg.LibDir, "images", "python.tar"), nil)
		if err != nil {
			return err
		}
		t.Run("contract", func(t *testing.T) {
			sandboxtest.TestRuntime(t, sandboxtest.RuntimeUnderTest{
				Runtime: b.Runtime, Image: images[0].Name, Patience: time.Minute, Kill: b.killQEMU,
			})
		})
		// The disk of an image is removed with its name.
		disks := filepath.Join(cfg.StateDir, "disks", "images")
		if list, err := os.ReadDir(disks); len(list) != 1 || err != nil {
			t.Errorf("disks of images: %v, %v, want one", list, err)
		}
		if err := b.Images.Remove(ctx, images[0].Name, nil); err != nil {
			t.Error(err)
		}
		if list, err := os.ReadDir(disks); len(list) != 0 || err != nil {
			t.Errorf("disks of images: %v, %v, want none", list, err)
		}
		return nil
	})
	if err != nil {
		t.Errorf("Run: %v", err)
	}
	if err := b.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// killQEMU kills the QEMU of a microVM, as if it had crashed.
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
	return fmt.Errorf("no VM %s", id)
}
