package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/backend/kata"
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
	err = b.Run(ctx, templates, func(ctx context.Context) error {
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
		// No template is built that was not admitted.
		building, stop := context.WithTimeout(ctx, time.Minute)
		defer stop()
		asked := 0
		b.kata.BuildTemplates(building, kata.TemplateBuilder{Admit: func(_ context.Context, memoryMiB int) (context.Context, func(), error) {
			stop()
			asked = memoryMiB
			return nil, nil, errors.New("there is no memory")
		}})
		left, err := b.disks.IDs()
		for _, id := range append(left, b.vms.IDs()...) {
			if strings.HasPrefix(id, "template-") {
				t.Errorf("%s is left of a build that was not admitted", id)
			}
		}
		if asked != cfg.DefaultMemoryMiB || err != nil {
			t.Errorf("a build has asked for %d MiB, want %d: %v", asked, cfg.DefaultMemoryMiB, err)
		}
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
