package sandbox

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// box is a name's place in the Manager: what it holds now, and the lock that lets one start or
// stop happen at a time.
type box struct {
	name Name
	// lock is held by the start or stop in progress. A channel, because waiters queue in order
	// and give up with their context.
	lock chan struct{}

	mu     sync.Mutex
	rec    Record // the zero Record when the name holds nothing
	link   *link
	cancel context.CancelCauseFunc // of the start in progress
	claim  *Config                 // what the start in progress will hold
	turns  map[Language]chan struct{}
	sample cpuSample

	// attaching serialises connected, which takes long and so must not hold mu. A channel, as lock is.
	attaching chan struct{}
}

// link is a connection to a sandbox's portal.
type link struct {
	Portal
	broken atomic.Bool
}

// watchedStream notices when a connection ends between two runs, so that the next run attaches
// anew instead of failing.
type watchedStream struct {
	io.ReadWriteCloser
	broken *atomic.Bool
}

func (s *watchedStream) Read(p []byte) (int, error) {
	n, err := s.ReadWriteCloser.Read(p)
	if err != nil {
		s.broken.Store(true)
	}
	return n, err
}

// acquire locks the name's box. With create, a name that holds nothing gets one; without, it is
// errdefs.ErrNotFound.
func (m *Manager) acquire(ctx context.Context, name Name, create bool) (*box, error) {
	for {
		m.mu.Lock()
		b := m.boxes[name]
		if b == nil {
			if !create {
				m.mu.Unlock()
				return nil, notFound(name)
			}
			b = newBox(name)
			m.boxes[name] = b
		}
		m.mu.Unlock()
		select {
		case b.lock <- struct{}{}:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		// The box may have been dropped while this call waited for it.
		m.mu.Lock()
		current := m.boxes[name] == b
		m.mu.Unlock()
		if current && (create || b.record().ID != "") {
			return b, nil
		}
		m.release(b)
	}
}

// release unlocks the box, and drops it when its name holds nothing.
func (m *Manager) release(b *box) {
	m.mu.Lock()
	if b.record().ID == "" && m.boxes[b.name] == b {
		delete(m.boxes, b.name)
	}
	m.mu.Unlock()
	<-b.lock
}

func newBox(name Name) *box {
	return &box{name: name, lock: make(chan struct{}, 1), attaching: make(chan struct{}, 1), turns: map[Language]chan struct{}{}}
}

func (b *box) record() Record {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.rec
}

// set replaces what the box holds and closes the connection that it had.
func (b *box) set(rec Record, l *link) {
	b.mu.Lock()
	old := b.link
	b.rec, b.link = rec, l
	b.mu.Unlock()
	if old != nil {
		old.Close()
	}
}

func (b *box) setClaim(c *Config) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.claim = c
}

// holds returns what counts against its tenant namespace's quota.
func (b *box) holds() (Config, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.claim != nil {
		return *b.claim, true
	}
	return b.rec.Config, b.rec.ID != "" && b.rec.State != Failed
}

func (b *box) setCancel(cancel context.CancelCauseFunc) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cancel = cancel
}

func (b *box) cancelStart(cause error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cancel != nil {
		b.cancel(cause)
	}
}

// turn is the queue for one language's REPL.
func (b *box) turn(l Language) chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	t := b.turns[l]
	if t == nil {
		t = make(chan struct{}, 1)
		b.turns[l] = t
	}
	return t
}

// connected returns the box's connection, making one when there is none that works.
func (b *box) connected(ctx context.Context, connect func(context.Context, string) (*link, error)) (*link, error) {
	if l, _ := b.usable(); l != nil {
		return l, nil
	}
	select {
	case b.attaching <- struct{}{}:
		defer func() { <-b.attaching }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	l, id := b.usable()
	if l != nil {
		return l, nil
	}
	l, err := connect(ctx, id)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	old := b.link
	current := b.rec.ID == id && b.rec.State == Running
	if current {
		b.link = l
	} else {
		old = l
	}
	b.mu.Unlock()
	if old != nil {
		old.Close()
	}
	if !current {
		return nil, notFound(b.name)
	}
	return l, nil
}

func (b *box) usable() (*link, string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.link == nil || b.link.broken.Load() {
		return nil, b.rec.ID
	}
	return b.link, b.rec.ID
}

// cpuSample is the last measurement of a sandbox's processor time.
type cpuSample struct {
	id      string
	at      time.Time
	used    time.Duration
	percent float64
}

// cpuPercent is the share of one processor used since the last measurement, or since the start
// when there is none. Measurements less than 100 ms apart repeat the last answer: too short a time
// says nothing.
func (b *box) cpuPercent(rec Record, used time.Duration, now time.Time) float64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	last := b.sample
	if last.id != rec.ID {
		last = cpuSample{id: rec.ID, at: rec.CreatedAt}
	}
	elapsed := now.Sub(last.at)
	if elapsed < 100*time.Millisecond {
		return last.percent
	}
	percent := max(0, 100*float64(used-last.used)/float64(elapsed))
	b.sample = cpuSample{rec.ID, now, used, percent}
	return percent
}
