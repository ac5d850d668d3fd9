package sandbox

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// entry is what the Manager knows of a name: the sandbox that has it now, and the lock that lets one start or
// stop happen at a time.
type entry struct {
	name Name
	// lock is held by the start or stop in progress. A channel, because waiters queue in order
	// and give up with their context.
	lock chan struct{}

	mu       sync.Mutex
	rec      Record // the zero Record if the name has no sandbox
	conn     *conn
	cancel   context.CancelCauseFunc // of the start in progress
	reserved *Config                 // what the start in progress will hold
	queues   map[Language]chan struct{}
	sample   cpuSample

	// attaching serialises connected, which takes long and so must not hold mu. A channel, as lock is.
	attaching chan struct{}
}

// conn is a connection to a sandbox's portal.
type conn struct {
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

// acquire locks the name's entry. With create, a name that has no sandbox gets one; without, it is
// errdefs.ErrNotFound.
func (m *Manager) acquire(ctx context.Context, name Name, create bool) (*entry, error) {
	for {
		m.mu.Lock()
		e := m.entries[name]
		if e == nil {
			if !create {
				m.mu.Unlock()
				return nil, notFound(name)
			}
			e = newEntry(name)
			m.entries[name] = e
		}
		m.mu.Unlock()
		select {
		case e.lock <- struct{}{}:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		// The entry may have been dropped while this call waited for it.
		m.mu.Lock()
		current := m.entries[name] == e
		m.mu.Unlock()
		if current && (create || e.record().ID != "") {
			return e, nil
		}
		m.release(e)
	}
}

// release unlocks the entry, and drops it if its name has no sandbox.
func (m *Manager) release(e *entry) {
	m.mu.Lock()
	if e.record().ID == "" && m.entries[e.name] == e {
		delete(m.entries, e.name)
	}
	m.mu.Unlock()
	<-e.lock
}

func newEntry(name Name) *entry {
	return &entry{name: name, lock: make(chan struct{}, 1), attaching: make(chan struct{}, 1), queues: map[Language]chan struct{}{}}
}

func (e *entry) record() Record {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.rec
}

// set replaces the record and the connection, and closes the connection that there was.
func (e *entry) set(rec Record, c *conn) {
	e.mu.Lock()
	old := e.conn
	e.rec, e.conn = rec, c
	e.mu.Unlock()
	if old != nil {
		old.Close()
	}
}

func (e *entry) setReserved(c *Config) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.reserved = c
}

// holds returns what counts against its tenant namespace's quota.
func (e *entry) holds() (Config, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.reserved != nil {
		return *e.reserved, true
	}
	return e.rec.Config, e.rec.ID != "" && e.rec.State != Failed
}

func (e *entry) setCancel(cancel context.CancelCauseFunc) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.cancel = cancel
}

func (e *entry) cancelStart(cause error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cancel != nil {
		e.cancel(cause)
	}
}

// replQueue holds one while a run of the language is in progress. Those who wait for their turn wait in order.
func (e *entry) replQueue(l Language) chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	t := e.queues[l]
	if t == nil {
		t = make(chan struct{}, 1)
		e.queues[l] = t
	}
	return t
}

// connected returns the connection to the sandbox, and makes one if there is none that works.
func (e *entry) connected(ctx context.Context, connect func(context.Context, string) (*conn, error)) (*conn, error) {
	if c, _ := e.usable(); c != nil {
		return c, nil
	}
	select {
	case e.attaching <- struct{}{}:
		defer func() { <-e.attaching }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	c, id := e.usable()
	if c != nil {
		return c, nil
	}
	c, err := connect(ctx, id)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	old := e.conn
	current := e.rec.ID == id && e.rec.State == Running
	if current {
		e.conn = c
	} else {
		old = c
	}
	e.mu.Unlock()
	if old != nil {
		old.Close()
	}
	if !current {
		return nil, notFound(e.name)
	}
	return c, nil
}

func (e *entry) usable() (*conn, string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.conn == nil || e.conn.broken.Load() {
		return nil, e.rec.ID
	}
	return e.conn, e.rec.ID
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
func (e *entry) cpuPercent(rec Record, used time.Duration, now time.Time) float64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	last := e.sample
	if last.id != rec.ID {
		last = cpuSample{id: rec.ID, at: rec.CreatedAt}
	}
	elapsed := now.Sub(last.at)
	if elapsed < 100*time.Millisecond {
		return last.percent
	}
	percent := max(0, 100*float64(used-last.used)/float64(elapsed))
	e.sample = cpuSample{rec.ID, now, used, percent}
	return percent
}
