package sandbox

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

// The pool has started microVMs that no tenant uses yet, so that a start can take one of them. Such an entry has run a command and
// a line of each language. It has a record with the state Pooled and without a name, so that it survives a restart of the server.
//
// The loop of RunPool alone starts entries, one at a time, and only while no tenant's start is in progress or waits. A start takes
// an entry whose template and image are its own. An entry that was taken never comes back. If a start lacks memory, the pool gives
// up all its entries.

const (
	// poolTick is how often the loop looks for what has changed without waking it: images, the age of entries, and the demand.
	poolTick = 15 * time.Second
	// poolAge is the age at which an entry is replaced, so that none becomes very different from a new microVM.
	poolAge = 12 * time.Hour
	// poolHold is how long the pool stays empty after it has given up its entries.
	poolHold = time.Minute
	// refillDelay is how long a refill waits after an entry was taken. So the refill does not take processor time from the first run
	// of the sandbox that has the entry.
	refillDelay = 300 * time.Millisecond
	// maxPoolSize is the largest number of entries of a template, and maxPools how many templates can have a pool besides the
	// default one.
	maxPoolSize = 100
	maxPools    = 32
	// poolShare is the part of the host's memory that the entries may have if no budget is set.
	poolShare = 8
)

// PoolOptions say which microVMs are started in advance.
type PoolOptions struct {
	// Unsupported says why the Runtime has no pool. It is empty if it can have one.
	Unsupported string
	// Min and Max are the least and the largest number of entries with the default template. If Min is 0, there is no pool.
	Min, Max int
	// MemoryMiB limits the sum of the memory of the entries. 0 stands for a part of the host's memory.
	MemoryMiB int
}

// PoolSize is the least and the largest number of entries with a template.
type PoolSize struct {
	Template
	Min int `json:"min"`
	Max int `json:"max"`
}

// pooled is an entry of the pool. Only the goroutine that has it changes it, until it is in pool.entries; then pool.mu guards it.
type pooled struct {
	id        string
	template  Template
	digest    string
	createdAt time.Time
	conn      *conn // nil in an entry of an earlier server, until the loop has connected
	cpu       time.Duration
	memory    uint64
	unwatch   context.CancelFunc
	// removeAfter is when its removal may be tried again, after it has failed.
	removeAfter time.Time
}

// poolShape is the pool of one template.
type poolShape struct {
	PoolSize
	digest       string // of the image, or empty if the image is not there
	demand       float64
	demandAt     time.Time
	hits, misses uint64
	failures     uint64
	failed       int // refills in a row
	lastError    string
	retryAt      time.Time
	waits        string // why no entry is started now, although one is missing
}

// pool is the pool of a Manager.
type pool struct {
	m    *Manager
	def  Template // of a start that names neither an image nor a size
	wake chan struct{}
	// setting serializes changes of the sizes, which wait for the store.
	setting sync.Mutex
	// working is held by the loop while it does not wait, and by StopPool.
	working chan struct{}

	mu      sync.Mutex
	stopped bool
	shapes  map[Template]*poolShape
	entries []*pooled // from the oldest to the newest
	doomed  []*pooled // to be removed
	// filling is the template of the refill in progress, which cancelFill ends.
	filling    *Template
	cancelFill context.CancelFunc
	holdUntil  time.Time
	refillAt   time.Time // when the refill after the last claim may begin
	lookedAt   time.Time // for images
	measuredAt time.Time
}

func (p *pool) init(m *Manager) {
	p.m, p.wake, p.working, p.shapes = m, make(chan struct{}, 1), make(chan struct{}, 1), map[Template]*poolShape{}
	def, _ := m.template(Request{})
	p.def = def.short()
	if p.off() == "" {
		m.admission.giveUp, m.admission.idle = p.giveUp, p.notify
	}
}

// off says why there is no pool, or returns "".
func (p *pool) off() string {
	switch o := p.m.Options.Pool; {
	case o.Unsupported != "":
		return o.Unsupported
	case o.Min == 0:
		return "the setting pool-min is 0"
	}
	return ""
}

// notify wakes the loop. It does not block.
func (p *pool) notify() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// load reads the sizes that administrators have set.
func (p *pool) load() error {
	if p.off() != "" {
		return nil
	}
	sizes, err := p.m.Store.Pools()
	if err != nil {
		return err
	}
	o := p.m.Options.Pool
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shapes[p.def] = &poolShape{PoolSize: PoolSize{p.def, o.Min, max(o.Min, o.Max)}}
	for _, size := range sizes {
		p.shapes[size.Template] = &poolShape{PoolSize: size}
	}
	return nil
}

// SetPool sets how many entries the pool has with the template of req, in which zero values stand for the server's defaults. 0 as
// max removes the pool of the template. The image must exist, unless max is 0.
func (m *Manager) SetPool(ctx context.Context, req Request, least, most int) (PoolSize, error) {
	t, err := m.template(req)
	if err != nil {
		return PoolSize{}, err
	}
	t = t.short()
	size := PoolSize{t, least, most}
	if least < 0 || most < least || most > maxPoolSize {
		return size, fmt.Errorf("min %d, max %d: give numbers from 0 to %d, and a max that is not less than min: %w", least, most, maxPoolSize, errdefs.ErrInvalidArgument)
	}
	if err := m.checkOpen(); err != nil {
		return size, err
	}
	if why := m.pool.off(); why != "" {
		return size, fmt.Errorf("this server has no pool: %s: %w", why, errdefs.ErrFailedPrecondition)
	}
	if most > 0 {
		if _, err := m.Runtime.ResolveImage(ctx, t.Image); err != nil {
			return size, err
		}
	}
	return size, m.pool.set(size)
}

func (p *pool) set(size PoolSize) error {
	p.setting.Lock()
	defer p.setting.Unlock()
	p.mu.Lock()
	known, n := p.shapes[size.Template] != nil, len(p.shapes)
	p.mu.Unlock()
	if size.Max == 0 && size.Template != p.def {
		if err := p.m.Store.DeletePool(size.Template); err != nil {
			return err
		}
		p.mu.Lock()
		delete(p.shapes, size.Template)
		p.mu.Unlock()
	} else {
		if !known && n > maxPools {
			return fmt.Errorf("%d templates have a pool, and no more can; remove one by setting its max to 0: %w", n, errdefs.ErrResourceExhausted)
		}
		if err := p.m.Store.PutPool(size); err != nil {
			return err
		}
		p.mu.Lock()
		shape := p.shapes[size.Template]
		if shape == nil {
			shape = &poolShape{}
			p.shapes[size.Template] = shape
		}
		shape.PoolSize, shape.failed, shape.retryAt = size, 0, time.Time{}
		p.lookedAt = time.Time{}
		p.mu.Unlock()
	}
	p.notify()
	return nil
}

// RunPool keeps the pool filled until ctx ends. It leaves the entries running; StopPool removes them. It begins once Recover has
// returned.
func (m *Manager) RunPool(ctx context.Context) error {
	select {
	case <-m.recovered:
	case <-ctx.Done():
		return nil
	}
	p := &m.pool
	for p.off() == "" && ctx.Err() == nil {
		timer := time.NewTimer(p.work(ctx))
		select {
		case <-p.wake:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
	return nil
}

// work does what the pool needs now, and starts at most one entry. It returns after which time to call it again.
func (p *pool) work(ctx context.Context) time.Duration {
	p.working <- struct{}{}
	defer func() { <-p.working }()
	if p.findImages(ctx) {
		p.retire(time.Now())
	}
	for _, e := range p.takeDoomed(time.Now()) {
		_ = p.discard(ctx, e)
	}
	p.connect(ctx)
	p.measure(ctx)
	if ctx.Err() != nil {
		return 0
	}
	t, fillCtx, end := p.next(ctx, time.Now())
	if end == nil {
		return p.patience(time.Now())
	}
	p.fill(fillCtx, t)
	end()
	return 0
}

// findImages finds out from time to time which images are there. It reports whether the pool knows all of them.
func (p *pool) findImages(ctx context.Context) bool {
	p.mu.Lock()
	due := time.Since(p.lookedAt) >= poolTick
	if due {
		p.lookedAt = time.Now() // before it looks, because a shape that is added meanwhile makes it due again
	}
	p.mu.Unlock()
	if !due {
		return true
	}
	for _, shape := range p.sorted() {
		if _, err := p.findImage(ctx, shape.Template); err != nil && !errdefs.IsNotFound(err) {
			if ctx.Err() == nil {
				p.m.Log.Warn("could not find an image of the pool", "image", shape.Image, "err", err)
			}
			p.mu.Lock()
			p.lookedAt = time.Time{}
			p.mu.Unlock()
			return false
		}
	}
	return true
}

// findImage returns the digest of the image of a template, which it remembers.
func (p *pool) findImage(ctx context.Context, t Template) (digest string, err error) {
	digest, err = p.m.Runtime.ResolveImage(ctx, t.Image)
	if err == nil || errdefs.IsNotFound(err) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if shape := p.shapes[t]; shape != nil {
			shape.digest = digest
		}
	}
	return digest, err
}

// sorted returns copies of the shapes, the default one first.
func (p *pool) sorted() []poolShape {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []poolShape
	for _, shape := range p.shapes {
		all = append(all, *shape)
	}
	slices.SortFunc(all, func(a, b poolShape) int {
		switch {
		case a.Template == p.def:
			return -1
		case b.Template == p.def:
			return 1
		}
		return strings.Compare(a.Template.String(), b.Template.String())
	})
	return all
}

// short returns the template with the short name of its image. The templates of the pool have it, so that a start finds an entry
// whichever way it names the image.
func (t Template) short() Template {
	t.Image = ShortImage(t.Image)
	return t
}

// String describes the template. Different templates have different descriptions.
func (t Template) String() string {
	return fmt.Sprintf("%s, %d cpus, %d MiB of memory, %d MiB of disk", t.Image, t.CPUs, t.MemoryMiB, t.DiskMiB)
}

// retire takes the entries out of the pool that are no longer wanted: of another image or template, too old, without a connection
// that works, or too many.
func (p *pool) retire(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	counts := map[Template]int{}
	budget := p.budget()
	for _, e := range slices.Backward(slices.Clone(p.entries)) { // the newest are kept
		shape := p.shapes[e.template]
		if shape == nil || shape.digest != e.digest || counts[e.template] >= shape.target(now) || e.template.MemoryMiB > budget ||
			now.Sub(e.createdAt) > poolAge || e.conn != nil && e.conn.broken.Load() {
			p.remove(e)
			p.doomed = append(p.doomed, e)
			continue
		}
		counts[e.template]++
		budget -= e.template.MemoryMiB
	}
}

// budget returns how much memory the entries may have together, in MiB. The caller holds mu.
func (p *pool) budget() int {
	if n := p.m.Options.Pool.MemoryMiB; n > 0 {
		return n
	}
	_, total, err := p.m.HostMemory()
	if err != nil {
		return 0
	}
	return int(total / poolShare >> 20)
}

// remove takes an entry out of the pool. It reports whether it was there. The caller holds mu.
func (p *pool) remove(e *pooled) bool {
	i := slices.Index(p.entries, e)
	if i >= 0 {
		p.entries = slices.Delete(p.entries, i, i+1)
	}
	return i >= 0
}

// doom lets the loop remove an entry that is not in the pool. e may be nil.
func (p *pool) doom(e *pooled) {
	if e == nil {
		return
	}
	p.mu.Lock()
	p.doomed = append(p.doomed, e)
	p.mu.Unlock()
	p.notify()
}

// takeDoomed returns the entries that are to be removed now.
func (p *pool) takeDoomed(now time.Time) (due []*pooled) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.doomed = slices.DeleteFunc(p.doomed, func(e *pooled) bool {
		if e.removeAfter.After(now) {
			return false
		}
		due = append(due, e)
		return true
	})
	return due
}

// discard removes the microVM and the record of an entry that is not in the pool. If it fails, the loop tries it again.
func (p *pool) discard(ctx context.Context, e *pooled) error {
	e.unwatch()
	if e.conn != nil {
		e.conn.Close()
	}
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	err := p.m.remove(ctx, e.id)
	if err == nil {
		err = p.m.Store.DeleteSandbox(e.id)
	}
	if err != nil {
		p.m.Log.Error("could not remove an entry of the pool", "id", e.id, "err", err)
		p.mu.Lock()
		defer p.mu.Unlock()
		e.removeAfter = time.Now().Add(poolTick)
		p.doomed = append(p.doomed, e)
	}
	return err
}

// adopt makes the microVM of a record an entry again. The loop connects to it.
func (p *pool) adopt(rec Record) {
	p.add(&pooled{id: rec.ID, template: rec.Config.Template, digest: rec.Digest, createdAt: rec.CreatedAt, cpu: time.Duration(rec.CPUNanos)})
}

// add watches an entry and adds it to the pool.
func (p *pool) add(e *pooled) {
	ctx, cancel := context.WithCancel(p.m.lifetime)
	e.unwatch = cancel
	p.mu.Lock()
	p.entries = append(p.entries, e)
	slices.SortStableFunc(p.entries, func(a, b *pooled) int { return a.createdAt.Compare(b.createdAt) })
	p.mu.Unlock()
	p.m.watchers.Go(func() {
		reason, err := p.m.Runtime.Wait(ctx, e.id)
		if ctx.Err() != nil {
			return
		}
		p.mu.Lock()
		found := p.remove(e)
		p.mu.Unlock()
		if found {
			p.m.Log.Warn("an entry of the pool has ended", "id", e.id, "reason", reason, "err", err)
			p.doom(e)
		}
	})
}

// connect connects to the entries of an earlier server.
func (p *pool) connect(ctx context.Context) {
	p.mu.Lock()
	entries := slices.Clone(p.entries)
	p.mu.Unlock()
	for _, e := range entries {
		if e.conn != nil { // only this loop changes it
			continue
		}
		limited, cancel := context.WithTimeout(ctx, p.m.StartTimeout)
		c, err := p.m.connect(limited, e.id)
		cancel()
		if ctx.Err() != nil && err != nil {
			return
		}
		p.mu.Lock()
		switch {
		case err == nil && slices.Contains(p.entries, e):
			e.conn = c
		case err == nil:
			c.Close()
		case p.remove(e):
			p.m.Log.Warn("could not connect to an entry of the pool", "id", e.id, "err", err)
			p.doomed = append(p.doomed, e)
			p.notify()
		}
		p.mu.Unlock()
	}
}

// giveUp removes all entries, because a start lacks memory. It is the giveUp of the admission.
func (p *pool) giveUp() (removals int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	entries := p.entries
	p.entries = nil
	for _, e := range entries {
		removals++
		p.m.watchers.Go(func() {
			defer p.m.admission.freed()
			_ = p.discard(p.m.lifetime, e)
		})
	}
	if removals > 0 {
		p.holdUntil = time.Now().Add(poolHold)
		p.m.Log.Info("the pool gives up its entries, because a start needs memory", "entries", removals)
	}
	return removals
}

// StopPool removes all entries and keeps the pool empty, when the server stops. After a crash, the next server finds them.
func (m *Manager) StopPool(ctx context.Context) error {
	p := &m.pool
	p.mu.Lock()
	p.stopped = true
	if p.cancelFill != nil {
		p.cancelFill()
	}
	p.mu.Unlock()
	select {
	case p.working <- struct{}{}:
		defer func() { <-p.working }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	p.mu.Lock()
	entries := append(p.entries, p.doomed...)
	p.entries, p.doomed = nil, nil
	p.mu.Unlock()
	var g errgroup.Group
	g.SetLimit(parallelism)
	for _, e := range entries {
		g.Go(func() error { return p.discard(ctx, e) })
	}
	return g.Wait()
}

// reopen lets the pool be filled again after StopPool.
func (p *pool) reopen() {
	p.mu.Lock()
	p.stopped = false
	p.mu.Unlock()
	p.notify()
}

// disconnect closes the connections to the entries.
func (p *pool) disconnect() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range p.entries {
		if e.conn != nil {
			e.conn.Close()
		}
	}
}
