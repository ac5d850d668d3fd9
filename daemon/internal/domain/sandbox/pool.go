package sandbox

import (
	"context"
	"errors"
	"fmt"
	"math"
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
	// poolMeasure is how often the loop measures the entries.
	poolMeasure = time.Minute
	// poolAge is the age at which an entry is replaced, so that none becomes very different from a new microVM.
	poolAge = 12 * time.Hour
	// poolHold is how long the pool stays empty after it has given up its entries.
	poolHold = time.Minute
	// demandHalf is the time in which the demand for a template falls to a half.
	demandHalf = 5 * time.Minute
	// The delay after a refill has failed doubles with each failure in a row.
	minPoolDelay = time.Second
	maxPoolDelay = 5 * time.Minute
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
	// working is held by the loop while it does not wait, and by stop.
	working chan struct{}

	mu      sync.Mutex
	stopped bool
	shapes  map[Template]*poolShape
	entries []*pooled // from the oldest to the newest
	doomed  []*pooled // to be removed
	// filling is the template of the refill in progress, which cancelFill ends. givenUp says that admission waits for its end.
	filling    *Template
	cancelFill context.CancelFunc
	givenUp    bool
	holdUntil  time.Time
	lookedAt   time.Time // for images
	measuredAt time.Time
}

func (p *pool) init(m *Manager) {
	p.m, p.wake, p.working, p.shapes = m, make(chan struct{}, 1), make(chan struct{}, 1), map[Template]*poolShape{}
	p.def, _ = m.template(Request{})
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
		p.discardLater(ctx, e)
	}
	p.connect(ctx)
	p.measure(ctx)
	if ctx.Err() != nil {
		return 0
	}
	shape, end := p.next(time.Now())
	if shape == nil {
		return p.patience(time.Now())
	}
	p.fill(ctx, shape.Template, end)
	return 0
}

// findImages finds out from time to time which images are there. It reports whether the pool knows all of them.
func (p *pool) findImages(ctx context.Context) bool {
	p.mu.Lock()
	due := time.Since(p.lookedAt) >= poolTick
	p.mu.Unlock()
	if !due {
		return true
	}
	for _, shape := range p.sorted() {
		if _, err := p.findImage(ctx, shape.Template); err != nil && !errdefs.IsNotFound(err) {
			if ctx.Err() == nil {
				p.m.Log.Warn("could not find an image of the pool", "image", shape.Image, "err", err)
			}
			return false
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lookedAt = time.Now()
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

// String describes the template. Different templates have different descriptions.
func (t Template) String() string {
	return fmt.Sprintf("%s, %d cpus, %d MiB of memory, %d MiB of disk", t.Image, t.CPUs, t.MemoryMiB, t.DiskMiB)
}

// target returns how many entries with the template there should be at a time.
func (s *poolShape) target(now time.Time) int {
	if s.digest == "" {
		return 0
	}
	return min(max(int(math.Round(s.demandNow(now))), s.Min), s.Max)
}

// demandNow returns the demand: the number of starts with the template, each of which counts less the longer ago it was.
func (s *poolShape) demandNow(now time.Time) float64 {
	return s.demand * math.Exp2(-now.Sub(s.demandAt).Seconds()/demandHalf.Seconds())
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
		counts[e.template]++
		if shape == nil || shape.digest != e.digest || counts[e.template] > shape.target(now) || e.memoryMiB() > budget ||
			now.Sub(e.createdAt) > poolAge || e.conn != nil && e.conn.broken.Load() {
			counts[e.template]--
			p.remove(e)
			p.doomed = append(p.doomed, e)
			continue
		}
		budget -= e.memoryMiB()
	}
}

func (e *pooled) memoryMiB() int { return e.template.MemoryMiB }

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

// discardLater is discard. If it fails, the loop tries it again.
func (p *pool) discardLater(ctx context.Context, e *pooled) error {
	err := p.discard(ctx, e)
	if err != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		e.removeAfter = time.Now().Add(poolTick)
		p.doomed = append(p.doomed, e)
	}
	return err
}

// discard removes the microVM and the record of an entry that is not in the pool.
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

// measure measures what the entries use.
func (p *pool) measure(ctx context.Context) {
	p.mu.Lock()
	due := time.Since(p.measuredAt) >= poolMeasure
	entries := slices.Clone(p.entries)
	if due {
		p.measuredAt = time.Now()
	}
	p.mu.Unlock()
	for _, e := range entries {
		if !due && e.memory > 0 { // only this loop changes it
			continue
		}
		limited, cancel := context.WithTimeout(ctx, measureTimeout)
		usage, err := p.m.Runtime.Usage(limited, e.id)
		cancel()
		if err != nil {
			continue // if the microVM has ended, its watcher knows
		}
		p.mu.Lock()
		e.cpu, e.memory = usage.CPUTime, usage.MemoryBytes
		p.mu.Unlock()
	}
}

// next returns the template of which an entry is to be started now, and a function that ends the reservation of its memory; or nil.
func (p *pool) next(now time.Time) (_ *poolShape, end func()) {
	all := p.sorted()
	p.mu.Lock()
	have, used := map[Template]int{}, 0
	for _, e := range p.entries {
		have[e.template]++
		used += e.memoryMiB()
	}
	budget, stopped, hold := p.budget(), p.stopped, p.holdUntil
	p.mu.Unlock()
	// The template that lacks most comes first.
	slices.SortStableFunc(all, func(a, b poolShape) int {
		return (b.target(now) - have[b.Template]) - (a.target(now) - have[a.Template])
	})
	for i := range all {
		shape := &all[i]
		waits := ""
		switch {
		case have[shape.Template] >= shape.target(now) || stopped:
		case now.Before(shape.retryAt):
			waits = "the last refill has failed"
		case now.Before(hold):
			waits = "sandboxes needed the memory of the pool"
		case used+shape.MemoryMiB > budget:
			waits = fmt.Sprintf("the entries may have %d MiB of memory together", budget)
		default:
			var err error
			if end, err = p.m.admission.tryRefill(uint64(shape.MemoryMiB) << 20); err == nil {
				p.setWaits(shape.Template, "")
				return shape, end
			}
			waits = err.Error()
		}
		p.setWaits(shape.Template, waits)
	}
	return nil, nil
}

func (p *pool) setWaits(t Template, why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if shape := p.shapes[t]; shape != nil {
		shape.waits = why
	}
}

// patience returns after which time there may be something to do, if nothing wakes the loop.
func (p *pool) patience(now time.Time) time.Duration {
	wait := poolTick
	for _, shape := range p.sorted() {
		if shape.retryAt.After(now) {
			wait = min(wait, shape.retryAt.Sub(now))
		}
	}
	return wait
}

// fill starts an entry. It calls end when the entry has its memory, or will never have it.
func (p *pool) fill(ctx context.Context, t Template, end func()) {
	fillCtx, cancel := context.WithTimeout(ctx, p.m.StartTimeout)
	defer cancel()
	p.mu.Lock()
	p.filling, p.cancelFill = &t, cancel
	if p.stopped {
		cancel()
	}
	p.mu.Unlock()
	began := time.Now()
	e, err := p.start(fillCtx, t)
	p.mu.Lock()
	givenUp, stopped := p.givenUp, p.stopped
	p.filling, p.cancelFill, p.givenUp = nil, nil, false
	p.mu.Unlock()
	given := givenUp || stopped
	if err == nil && given {
		err = errBusy // it was given up at the last moment
	}
	if err == nil {
		p.add(e)
		p.m.Log.Info("added an entry to the pool", "id", e.id, "image", t.Image, "took", time.Since(began).Round(time.Millisecond))
	} else {
		_ = p.discardLater(context.WithoutCancel(ctx), e) // also when the server stops
	}
	end()
	if givenUp {
		p.m.admission.freed()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	shape := p.shapes[t]
	switch {
	case shape == nil || given || ctx.Err() != nil:
	case err == nil:
		shape.failed, shape.lastError, shape.retryAt = 0, "", time.Time{}
	default:
		delay := min(minPoolDelay<<min(shape.failed, 16), maxPoolDelay)
		shape.failed, shape.failures, shape.lastError, shape.retryAt = shape.failed+1, shape.failures+1, err.Error(), time.Now().Add(delay)
		p.m.Log.Warn("could not add an entry to the pool", "image", t.Image, "retry_in", delay, "err", err)
	}
}

// start starts a microVM, warms it and records it as an entry. If it fails, the caller must discard the entry.
func (p *pool) start(ctx context.Context, t Template) (*pooled, error) {
	m := p.m
	rec := Record{ID: newID(), Config: Config{t, Binding{Hostname: DefaultHostname}}, State: Starting, CreatedAt: time.Now().UTC()}
	e := &pooled{id: rec.ID, template: t, createdAt: rec.CreatedAt, unwatch: func() {}}
	digest, err := p.findImage(ctx, t)
	if err != nil {
		return e, err
	}
	e.digest, rec.Digest = digest, digest
	if err := m.CheckSpace(); err != nil {
		return e, err
	}
	if err := m.Store.PutSandbox(rec); err != nil {
		return e, err
	}
	_, err = m.Runtime.Start(ctx, e.id, t, DefaultHostname)
	if err == nil {
		e.conn, err = m.connect(ctx, e.id)
	}
	if err == nil {
		err = warm(ctx, e.conn)
	}
	if err != nil {
		return e, errors.Join(err, context.Cause(ctx))
	}
	if found, err := m.Runtime.ResolveImage(ctx, t.Image); err != nil || found != digest {
		return e, errors.Join(errors.New("the image was replaced meanwhile"), err)
	}
	usage, err := m.Runtime.Usage(ctx, e.id)
	if err != nil {
		return e, err
	}
	e.cpu, e.memory = usage.CPUTime, usage.MemoryBytes
	rec.State, rec.CPUNanos = Pooled, usage.CPUTime.Nanoseconds()
	return e, m.Store.PutSandbox(rec)
}

// warm runs a command, which need not exist, and a line of each language that the image has. It leaves the interpreters started.
func warm(ctx context.Context, c Portal) error {
	if err := runTrue(ctx, c); err != nil {
		return fmt.Errorf("run a command in the microVM: %w", err)
	}
	if err := c.Warm(ctx, []Language{Python, Node}); err != nil {
		return fmt.Errorf("start interpreters in the microVM: %w", err)
	}
	return nil
}

func runTrue(ctx context.Context, c Portal) error {
	process, err := c.RunCommand(ctx, Command{Program: "true"})
	if err != nil {
		return err
	}
	defer process.Close()
	for {
		switch event, err := process.Next(); {
		case errors.Is(err, ErrCommandNotFound), errors.Is(err, ErrCommandNotExecutable):
			return nil
		case err != nil:
			return err
		default:
			if _, ended := event.(Exit); ended {
				return nil
			}
		}
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
			_ = p.discardLater(p.m.lifetime, e)
		})
	}
	if p.cancelFill != nil && !p.givenUp {
		removals++
		p.givenUp = true
		p.cancelFill()
	}
	if removals > 0 {
		p.holdUntil = time.Now().Add(poolHold)
		p.m.Log.Info("the pool gives up its entries, because a start needs memory", "entries", removals)
	}
	return removals
}

// StopPool removes all entries and keeps the pool empty, when the server stops. After a crash, the next server finds them.
func (m *Manager) StopPool(ctx context.Context) error { return m.pool.stop(ctx) }

// stop removes all entries and keeps the pool empty.
func (p *pool) stop(ctx context.Context) error {
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
		g.Go(func() error { return p.discardLater(ctx, e) })
	}
	return g.Wait()
}

// reopen lets the pool be filled again after stop.
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

// PoolStatus describes the pool.
type PoolStatus struct {
	// Off says why there is no pool. It is empty if there is one.
	Off string
	// MemoryMiB is the sum of the memory that the entries may use, and MaxMemoryMiB its limit.
	MemoryMiB, MaxMemoryMiB int
	Templates               []TemplateStatus
}

// TemplateStatus describes the entries of the pool with one template.
type TemplateStatus struct {
	PoolSize
	Default bool
	// Target is how many entries there should be now.
	Target int
	// Ready is the number of entries that a start can take, and Filling says that one is being started.
	Ready   int
	Filling bool
	// Hits and Misses are the numbers of starts that took an entry, and that found none.
	Hits, Misses uint64
	// Failures is how many refills have failed, and LastError why the last one has, if no other has succeeded since. It may name
	// parts of the host.
	Failures  uint64
	LastError string
	// Waits says why no entry is started although one is missing. RetryAt is when the next one is tried after a failure.
	Waits   string
	RetryAt time.Time
	// Oldest is when the oldest entry was started. CPU and MemoryBytes are what the entries have used, and use.
	Oldest      time.Time
	CPU         time.Duration
	MemoryBytes uint64
}

// PoolStatus describes the pool. It does not block.
func (m *Manager) PoolStatus() PoolStatus {
	p := &m.pool
	s := PoolStatus{Off: p.off()}
	if s.Off != "" {
		return s
	}
	now := time.Now()
	shapes := p.sorted()
	p.mu.Lock()
	defer p.mu.Unlock()
	s.MaxMemoryMiB = p.budget()
	for _, shape := range shapes {
		t := TemplateStatus{
			PoolSize: shape.PoolSize, Default: shape.Template == p.def, Target: shape.target(now), Filling: p.filling != nil && *p.filling == shape.Template,
			Hits: shape.hits, Misses: shape.misses, Failures: shape.failures, LastError: shape.lastError, Waits: shape.waits,
		}
		if shape.retryAt.After(now) {
			t.RetryAt = shape.retryAt
		}
		if shape.digest == "" && shape.Max > 0 {
			t.Waits = "the image has not been imported"
		}
		for _, e := range p.entries {
			if e.template != shape.Template {
				continue
			}
			s.MemoryMiB += e.memoryMiB()
			if e.conn != nil { // otherwise a start does not take it yet
				t.Ready++
			}
			if t.Oldest.IsZero() {
				t.Oldest = e.createdAt
			}
			t.CPU += e.cpu
			t.MemoryBytes += e.memory
		}
		s.Templates = append(s.Templates, t)
	}
	return s
}
