package kata

import (
	"fmt"
	"slices"
	"testing"
	"time"

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
