package kata

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/backend/disk"
	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// A template is built for an image that was imported, and for sandboxes of a size that was started twice. Of the latter, only
// those that were used last are built.
func TestWantedTemplates(t *testing.T) {
	w := wantedTemplates{wake: make(chan struct{}, 1)}
	now := time.Now()
	due := func(limit int) (images []string) {
		for _, t := range w.due(now, limit) {
			images = append(images, t.Image)
		}
		return images
	}
	want := func(limit int, images ...string) {
		t.Helper()
		if got := due(limit); !slices.Equal(got, images) {
			t.Errorf("with at most %d templates, those for %q are built, want %q", limit, got, images)
		}
	}
	w.keep(sandbox.Template{Image: "imported"})
	if len(w.wake) != 1 {
		t.Error("BuildTemplates is not woken up by an import")
	}
	<-w.wake
	w.started(sandbox.Template{Image: "once"}, true)
	want(4, "imported")
	w.started(sandbox.Template{Image: "twice"}, true)
	w.started(sandbox.Template{Image: "twice", CPUs: 2}, true)
	want(4, "imported")
	w.started(sandbox.Template{Image: "twice"}, true)
	w.started(sandbox.Template{Image: "more"}, true)
	w.started(sandbox.Template{Image: "more"}, true)
	want(4, "imported", "more", "twice")
	want(2, "imported", "more")
	w.started(sandbox.Template{Image: "twice"}, true)
	want(2, "imported", "twice")
	w.due(now, 1)[0].retryAt = now.Add(time.Second) // its build has failed
	want(2, "twice")
	now = now.Add(time.Second)
	want(2, "imported", "twice")
	w.forget(sandbox.Template{Image: "imported"})
	want(2, "twice", "more")
	w.built(w.due(now, 1)[0])
	want(2, "more") // when the template is too old, it is not built again unless it was used
	w.started(sandbox.Template{Image: "twice"}, false)
	w.started(sandbox.Template{Image: "twice"}, false)
	want(2, "twice", "more")
	for i := range 2 * maxKinds {
		w.started(sandbox.Template{Image: fmt.Sprint(i)}, true)
	}
	if len(w.wanted) != maxKinds {
		t.Errorf("%d kinds are remembered, want %d", len(w.wanted), maxKinds)
	}
	<-w.wake
	if w.started(sandbox.Template{Image: "twice"}, false); len(w.wake) != 0 {
		t.Error("BuildTemplates is woken up although there is a template")
	}
}

// A build that was not admitted is tried again soon, and one that a start has ended after a minute. Neither is a failure, after
// which the wait is longer each time.
func TestBuildsAreTriedAgain(t *testing.T) {
	r, log := newTestRuntime(t)
	r.templates.wake = make(chan struct{}, 1)
	r.templates.keep(sandbox.Template{Image: "i"})
	kind := r.templates.due(time.Now(), 1)[0]
	isDueAfter := func(err error, want time.Duration, logged string) {
		t.Helper()
		log.Reset()
		if again := r.recordBuild(kind, err); again != want {
			t.Errorf("after %v: again in %s, want %s", err, again, want)
		}
		if logged == "" && log.Len() > 0 || !strings.Contains(log.String(), logged) {
			t.Errorf("after %v: log %s, want %q", err, log, logged)
		}
		if len(r.templates.due(time.Now().Add(want), 1)) != 1 {
			t.Errorf("after %v: not due after %s", err, want)
		}
	}
	isDueAfter(nil, templateCheck, "")
	isDueAfter(notAdmitted{errors.New("the host has no memory")}, admitRetry, "the host has no memory")
	isDueAfter(notAdmitted{errors.New("the host has no memory")}, admitRetry, "")
	isDueAfter(nil, templateCheck, "")
	isDueAfter(hypervisor.ErrTemplatesInUse, templateCheck, "raise max_templates")
	isDueAfter(hypervisor.ErrTemplatesInUse, templateCheck, "")
	isDueAfter(errors.New("QEMU exited"), firstRetry, "level=ERROR")
	isDueAfter(errors.Join(sandbox.ErrGivenUp, errors.New("QEMU exited")), firstRetry, "level=INFO")
	if len(r.templates.due(time.Now(), 1)) != 0 {
		t.Error("a build that a start has ended is due at once")
	}
	isDueAfter(errors.New("QEMU exited"), 2*firstRetry, "level=ERROR")
	isDueAfter(nil, templateCheck, "")
	isDueAfter(errors.New("QEMU exited"), firstRetry, "level=ERROR")
	r.recordBuild(kind, errdefs.ErrNotFound)
	if len(r.templates.wanted) != 0 {
		t.Error("the template of an image that was removed is still wanted")
	}
}

// oldTemplates counts the calls of RemoveOldTemplates.
type oldTemplates struct {
	VMs
	removals int
}

func (o *oldTemplates) RemoveOldTemplates() { o.removals++ }

// Templates that are too old are removed although nothing is built.
func TestOldTemplatesAreRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newTestRuntime(t)
		old := &oldTemplates{}
		r.VMs = old
		ctx, cancel := context.WithTimeout(t.Context(), 3*templateCheck+time.Second)
		defer cancel()
		r.BuildTemplates(ctx, TemplateBuilder{})
		if old.removals != 4 {
			t.Errorf("old templates were removed %d times in %s, want 4", old.removals, 3*templateCheck)
		}
	})
}

// stubbornVMs cannot remove a microVM until the third attempt.
type stubbornVMs struct {
	oldTemplates
	attempts atomic.Int32
}

func (s *stubbornVMs) Remove(context.Context, string) error {
	if s.attempts.Add(1) < 3 {
		return errors.New("busy")
	}
	return nil
}

// What the build of a template has left is removed later if that fails, the disks not before the microVM.
func TestRemovalOfBuildIsTriedAgain(t *testing.T) {
	disks, err := disk.New(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		r, log := newTestRuntime(t)
		vms := &stubbornVMs{}
		r.VMs, r.Disks, r.templates.leftovers = vms, disks, []string{"template-1"}
		writeFile(t, filepath.Join(filepath.Dir(disks.Accounts("template-1")), "template-1", "upper.ext4"), "x")
		ctx, cancel := context.WithCancel(t.Context())
		var loop sync.WaitGroup
		loop.Go(func() { r.BuildTemplates(ctx, TemplateBuilder{}) })
		for i, left := range []int{1, 1, 0} {
			time.Sleep(removeRetry - time.Second)
			synctest.Wait()
			ids, err := disks.IDs()
			if err != nil || len(ids) != left || int(vms.attempts.Load()) != i+1 {
				t.Errorf("in minute %d: the disks %q, %v, after %d attempts", i+1, ids, err, vms.attempts.Load())
			}
			time.Sleep(time.Second)
		}
		cancel()
		loop.Wait()
		if n := strings.Count(log.String(), "busy"); n != 2 || vms.attempts.Load() != 3 {
			t.Errorf("%d attempts, log %s", vms.attempts.Load(), log)
		}
	})
}
