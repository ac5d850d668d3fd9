package sandboxtest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// RuntimeUnderTest is a sandbox.Runtime with what TestRuntime needs to test it.
type RuntimeUnderTest struct {
	sandbox.Runtime
	// Image is an image that the Runtime has.
	Image string
	// Kill ends a microVM from outside, like a crash.
	Kill func(id string) error
	// Patience is the timeout of each step.
	Patience time.Duration
}

// TestRuntime checks the contract of sandbox.Runtime. It starts one microVM.
func TestRuntime(t *testing.T, r RuntimeUnderTest) {
	const id = "contract000000000000" // for which sandbox.IsID is true
	ctx, cancel := context.WithTimeout(t.Context(), 5*r.Patience)
	defer cancel()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), r.Patience)
		defer cancel()
		if err := r.Remove(ctx, id); err != nil {
			t.Error(err)
		}
	})
	find := func() (found sandbox.Instance, ok bool) {
		t.Helper()
		all, err := r.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(all, func(i sandbox.Instance) bool { return i.ID == id })
		if i < 0 {
			return found, false
		}
		return all[i], true
	}

	digest, err := r.ResolveImage(ctx, r.Image)
	if err != nil || !strings.HasPrefix(digest, "sha256:") {
		t.Errorf("resolve an existing image: digest %q, error %v", digest, err)
	}
	named, err := reference.ParseNormalizedNamed(r.Image)
	if err != nil {
		t.Fatal(err)
	}
	full := reference.TagNameOnly(named).String()
	if again, err := r.ResolveImage(ctx, full); err != nil || again != digest || sandbox.ShortImage(full) != r.Image {
		t.Errorf("resolve %s: digest %q, error %v, want %q; its short name is %q", full, again, err, digest, sandbox.ShortImage(full))
	}
	if _, err := r.ResolveImage(ctx, AbsentImage); !errdefs.IsNotFound(err) {
		t.Errorf("resolve an image that does not exist: got error %v, want NotFound", err)
	}
	template := sandbox.Template{Image: AbsentImage, CPUs: 1, MemoryMiB: 256, DiskMiB: 256}
	if _, err := r.Start(ctx, id, template, sandbox.DefaultHostname); !errdefs.IsNotFound(err) {
		t.Errorf("start from an image that does not exist: got error %v, want NotFound", err)
	}
	if err := r.Remove(ctx, id); err != nil {
		t.Errorf("remove a microVM that was never started: %v", err)
	}
	if found, ok := find(); ok {
		t.Errorf("before the start, List returns %+v", found)
	}
	if _, err := r.Attach(ctx, id, ""); err == nil {
		t.Error("Attach succeeded before the start")
	}
	if _, err := r.Usage(ctx, id); err == nil {
		t.Error("Usage succeeded before the start")
	}

	template.Image = r.Image
	if origin, err := r.Start(ctx, id, template, sandbox.DefaultHostname); err != nil || origin.From == "" {
		t.Fatalf("start: origin %+v, error %v", origin, err)
	}
	if found, ok := find(); !ok || !found.Alive {
		t.Errorf("after the start, List returns %+v, found %t, want an alive microVM", found, ok)
	}
	if u, err := r.Usage(ctx, id); err != nil || u.MemoryBytes == 0 {
		t.Errorf("usage: %+v, error %v", u, err)
	}
	stream, err := r.Attach(ctx, id, "")
	if err != nil {
		t.Fatalf("attach: %v", err)
	}
	defer stream.Close()
	second, err := r.Attach(ctx, id, "")
	if err != nil {
		t.Errorf("attach again: %v", err)
	} else if err := second.Close(); err != nil {
		t.Errorf("close a stream: %v", err)
	}

	waitCtx, cancelWait := context.WithCancelCause(ctx)
	errCanceled := errors.New("canceled")
	cancelWait(errCanceled)
	if _, err := r.Wait(waitCtx, id); !errors.Is(err, errCanceled) {
		t.Errorf("canceled wait: got error %v, want the cause", err)
	}
	ended := make(chan string, 1)
	go func() {
		reason, err := r.Wait(ctx, id)
		if err != nil {
			reason = "error: " + err.Error()
		}
		ended <- reason
	}()
	if err := r.Kill(id); err != nil {
		t.Fatalf("kill: %v", err)
	}
	if reason := <-ended; reason == "" || reason[0] == 'e' {
		t.Errorf("Wait returned the reason %q", reason)
	}
	late := time.AfterFunc(r.Patience/4, func() {
		t.Error("the connection to a portal did not end with its microVM")
		stream.Close()
	})
	for err = nil; err == nil; { // discard data that was sent before the end
		_, err = stream.Read(make([]byte, 1<<16))
	}
	late.Stop()
	if found, ok := find(); !ok || found.Alive {
		t.Errorf("after the end, List returns %+v, found %t, want a dead microVM", found, ok)
	}
	for range 2 { // the second Remove has nothing to remove
		if err := r.Remove(ctx, id); err != nil {
			t.Errorf("remove: %v", err)
		}
		if found, ok := find(); ok {
			t.Errorf("after Remove, List returns %+v", found)
		}
	}
}
