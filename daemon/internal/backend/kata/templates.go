package kata

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd"
	"github.com/containerd/errdefs"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

const (
	// templateCheck is how often BuildTemplates looks for templates that are too old. It also looks when a
	// sandbox has started or the images have changed.
	templateCheck = 10 * time.Minute
	// templateTimeout limits the build of one template.
	templateTimeout = 5 * time.Minute
	// removeTimeout limits the removal of what the build of a template leaves. If it fails, it is tried again after removeRetry.
	removeTimeout = 30 * time.Second
	removeRetry   = time.Minute
	// admitRetry is after which time a build is tried again that was not admitted.
	admitRetry = 5 * time.Second
	// If the build of a template fails, or a start of a sandbox has ended it, it is tried again after firstRetry. After each
	// further failure, the wait is twice as long, up to lastRetry.
	firstRetry = time.Minute
	lastRetry  = 4 * time.Hour
)

// Admit begins the build of a template of sandboxes with this memory, or returns why it must not begin now. The build must end
// early if the returned context ends, which has the cause sandbox.ErrGivenUp if a sandbox needs the memory. The caller must call
// end when the build has ended.
type Admit func(ctx context.Context, memoryMiB int) (_ context.Context, end func(), err error)

// A TemplateBuilder says when templates are built, and how.
type TemplateBuilder struct {
	Admit    Admit
	Rehearse hypervisor.Rehearse
}

// notAdmitted is the error of Admit.
type notAdmitted struct{ error }

// wantedTemplates are the kinds of sandboxes that may get a template. A kind is an image and a size.
type wantedTemplates struct {
	wake chan struct{} // with room for one; has an element if BuildTemplates should look for work

	leftovers []string // the ids of builds whose microVM or disks could not be removed; only BuildTemplates uses them

	mu     sync.Mutex
	wanted []*wantedTemplate // the kind that was started last is first
}

type wantedTemplate struct {
	sandbox.Template
	kept   bool // the template is wanted before there are minStarts, and before those of other kinds
	starts int  // of sandboxes of this kind since its template was built by this server

	// Only BuildTemplates uses these.
	refused bool          // the last build was not admitted, or there was no place for it
	retryAt time.Time     // when the next build may begin, after one has failed
	pause   time.Duration // the wait after the last failure; 0 if the last build succeeded
}

// minStarts is how many sandboxes of a kind must have started before its template is built, or is built again. A build takes as
// long as a few boots, so it does not pay for a kind that is started once.
const minStarts = 2

// maxKinds is how many kinds of sandboxes are remembered.
const maxKinds = 64

// keep wants the template of a kind before sandboxes of it have started.
func (w *wantedTemplates) keep(kind sandbox.Template) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.use(kind).kept = true
	w.wakeUp()
}

// started counts a start of a sandbox of a kind. missing says that there was no template for it.
func (w *wantedTemplates) started(kind sandbox.Template, missing bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.use(kind).starts++
	if missing {
		w.wakeUp()
	}
}

// forget forgets a kind.
func (w *wantedTemplates) forget(kind sandbox.Template) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wanted = slices.DeleteFunc(w.wanted, func(t *wantedTemplate) bool { return t.Template == kind })
}

// built records that the template for t was built.
func (w *wantedTemplates) built(t *wantedTemplate) {
	w.mu.Lock()
	defer w.mu.Unlock()
	t.starts = 0
}

// isKept reports whether the template for t is kept.
func (w *wantedTemplates) isKept(t *wantedTemplate) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return t.kept
}

// wakeUp makes BuildTemplates look for work.
func (w *wantedTemplates) wakeUp() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// use makes a kind the one that was used last, and returns it. The caller holds mu.
func (w *wantedTemplates) use(kind sandbox.Template) *wantedTemplate {
	t := &wantedTemplate{Template: kind}
	if i := slices.IndexFunc(w.wanted, func(t *wantedTemplate) bool { return t.Template == kind }); i >= 0 {
		t = w.wanted[i]
		w.wanted = slices.Delete(w.wanted, i, i+1)
	}
	w.wanted = slices.Insert(w.wanted, 0, t)
	w.wanted = w.wanted[:min(maxKinds, len(w.wanted))]
	return t
}

// due returns the kinds whose templates should exist: those that are kept, and of those with minStarts the ones that were started
// last, at most limit in all. So clients that start many kinds cannot take the place of the kept ones. due leaves out those whose
// last build failed not long ago. It does not know which templates exist.
func (w *wantedTemplates) due(now time.Time, limit int) (due []*wantedTemplate) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, kept := range []bool{true, false} {
		for _, t := range w.wanted {
			if t.kept != kept || !kept && t.starts < minStarts {
				continue
			}
			if limit--; limit >= 0 && !now.Before(t.retryAt) {
				due = append(due, t)
			}
		}
	}
	return due
}

// KeepTemplate makes BuildTemplates build the template for sandboxes with an image and the size of t, and keep it.
func (r *Runtime) KeepTemplate(image containerd.Image, t sandbox.Template) {
	t.Image = image.Name() // the full name; clients may use a shorter one
	r.templates.keep(t)
}

// BuildTemplates builds the templates that are wanted and missing, one at a time, until ctx ends. It also builds those again
// that are too old, or that were removed because they were damaged or their clones failed. While a template is missing,
// sandboxes boot.
func (r *Runtime) BuildTemplates(ctx context.Context, builder TemplateBuilder) {
	for {
		wait := templateCheck
		r.VMs.RemoveOldTemplates()
		if !r.removeBuilds(ctx) {
			wait = removeRetry
		}
		for _, t := range r.templates.due(time.Now(), r.MaxTemplates) {
			err := r.buildTemplate(ctx, t, builder)
			if ctx.Err() != nil {
				return
			}
			wait = min(wait, r.recordBuild(t, err))
		}
		timer := time.NewTimer(wait)
		select {
		case <-r.templates.wake:
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		timer.Stop()
	}
}

// recordBuild records how the build of the template for t has ended. It returns after which time to look at t again.
func (r *Runtime) recordBuild(t *wantedTemplate, err error) (again time.Duration) {
	log := r.Log.With("image", t.Image, "cpus", t.CPUs, "memory_mib", t.MemoryMiB, "disk_mib", t.DiskMiB)
	_, refused := errors.AsType[notAdmitted](err)
	noPlace := errors.Is(err, hypervisor.ErrTemplatesInUse)
	logged := t.refused
	t.refused = refused || noPlace
	switch {
	case err == nil:
		t.pause = 0
	case errdefs.IsNotFound(err): // the image was removed
		r.templates.forget(t.Template)
	case refused || noPlace:
		if !logged {
			log.Info("a template is not built yet; sandboxes boot instead", "why", err)
		}
		if refused {
			return admitRetry
		}
	case errors.Is(err, sandbox.ErrGivenUp):
		t.retryAt = time.Now().Add(firstRetry)
		log.Info("the build of a template was ended; sandboxes boot instead", "why", sandbox.ErrGivenUp, "again_in", firstRetry)
		return firstRetry
	default:
		t.pause = min(max(firstRetry, 2*t.pause), lastRetry)
		t.retryAt = time.Now().Add(t.pause)
		log.Error("could not build a template; sandboxes boot instead", "err", err, "again_in", t.pause)
		return t.pause
	}
	return templateCheck
}

// buildTemplate builds the template for sandboxes of kind t, unless there is one that is not too old. If a sandbox needs the memory,
// the error wraps sandbox.ErrGivenUp.
func (r *Runtime) buildTemplate(ctx context.Context, t *wantedTemplate, builder TemplateBuilder) (err error) {
	image, err := r.Image(ctx, t.Image)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctrd.InNamespace(ctx), templateTimeout)
	defer cancel()
	id, began := "template-"+randomHex(), false
	defer func() {
		if !began {
			err = errors.Join(err, r.Disks.Remove(id))
		}
	}()
	vm, err := r.prepareVM(ctx, id, t.Template, sandbox.DefaultHostname, image)
	if err != nil {
		return err
	}
	vm.KeepTemplate = r.templates.isKept(t)
	built, err := r.VMs.TemplateBuilt(vm)
	if err != nil || !built.IsZero() {
		return err
	}
	admitted, end, err := builder.Admit(ctx, t.MemoryMiB)
	if err != nil {
		return notAdmitted{err}
	}
	began = true
	defer func() {
		r.templates.leftovers = append(r.templates.leftovers, id)
		r.removeBuilds(ctx)
		end() // now its memory is free
	}()
	start := time.Now()
	if err := r.VMs.BuildTemplate(admitted, vm, builder.Rehearse); err != nil {
		if admitted.Err() != nil {
			err = errors.Join(context.Cause(admitted), err)
		}
		return err
	}
	r.templates.built(t)
	r.Log.Info("a template was built", "image", t.Image, "cpus", t.CPUs, "memory_mib", t.MemoryMiB, "disk_mib", t.DiskMiB, "took", time.Since(start).Round(time.Millisecond))
	return nil
}

// removeBuilds removes the microVMs and the disks that builds have left. It reports whether nothing is left.
func (r *Runtime) removeBuilds(ctx context.Context) bool {
	r.templates.leftovers = slices.DeleteFunc(r.templates.leftovers, func(id string) bool {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
		defer cancel()
		err := r.VMs.Remove(ctx, id)
		if err == nil { // otherwise QEMU may still use the disks
			err = r.Disks.Remove(id)
		}
		if err != nil {
			r.Log.Error("could not remove what the build of a template has left", "id", id, "err", err, "again_in", removeRetry)
		}
		return err == nil
	})
	return len(r.templates.leftovers) == 0
}
