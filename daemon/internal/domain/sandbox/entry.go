package sandbox

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// entry is the state of a name: the sandbox that currently has the name, and a lock that serializes starts and stops of
// the name.
type entry struct {
	name Name
	// lock is held by the start or stop in progress. It is a channel so that waiters get it in order and can stop waiting
	// when their context is canceled.
	lock chan struct{}

	mu       sync.Mutex
	rec      Record // the zero Record if the name has no sandbox
	conn     *conn
	cancel   context.CancelCauseFunc // cancels the start in progress
	reserved *Config                 // counts against the quota instead of rec, while a start is in progress
	queues   map[queueName]*runQueue
	sample   cpuSample

	// connecting serializes connection, which takes too long to hold mu. It is a channel for the same reasons as lock.
	connecting chan struct{}
	// calls has an element for each operation in the sandbox that has not ended.
	calls chan struct{}
}

// maxCalls is how many operations in a sandbox may be in progress at a time. The portal serves 1,024 calls; more would wait.
const maxCalls = 1000

// conn is a connection to a sandbox's portal. Once it is broken, the next run opens a new one.
type conn struct {
	Portal
	broken atomic.Bool
}

// watchedStream sets broken when the stream ends, on either side. The portal's client closes it after every error of the
// connection, whatever the guest sent.
type watchedStream struct {
	io.ReadWriteCloser
	broken *atomic.Bool
}

func (s *watchedStream) Close() error {
	s.broken.Store(true)
	return s.ReadWriteCloser.Close()
}

func (s *watchedStream) Read(p []byte) (int, error) {
	n, err := s.ReadWriteCloser.Read(p)
	if err != nil {
		s.broken.Store(true)
	}
	return n, err
}

// acquire returns the entry of a name with its lock held. If the name has no sandbox, acquire creates an entry if create
// is set, and returns errdefs.ErrNotFound otherwise.
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
		// The entry may have been deleted while this call waited for its lock.
		m.mu.Lock()
		current := m.entries[name] == e
		m.mu.Unlock()
		if current && (create || e.record().ID != "") {
			return e, nil
		}
		m.release(e)
	}
}

// release unlocks the entry, and deletes it if its name has no sandbox.
func (m *Manager) release(e *entry) {
	m.mu.Lock()
	if e.record().ID == "" && m.entries[e.name] == e {
		delete(m.entries, e.name)
	}
	m.mu.Unlock()
	<-e.lock
}

func newEntry(name Name) *entry {
	return &entry{
		name: name, lock: make(chan struct{}, 1), connecting: make(chan struct{}, 1), calls: make(chan struct{}, maxCalls),
		queues: map[queueName]*runQueue{},
	}
}

func (e *entry) record() Record {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.rec
}

// set replaces the record and the connection, and closes the previous connection.
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

// quotaUse returns the configuration that counts against the quota of the tenant namespace, and whether one does.
func (e *entry) quotaUse() (Config, bool) {
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

// queueName names the queue of the runs in a context: by the context's name, or by a language and a user. It is not empty.
type queueName struct {
	context  string
	language Language
	user     string
}

// runQueue is the queue of the runs in a context.
type runQueue struct {
	// turn has room for one run, so that runs execute one at a time, in the order in which they came.
	turn chan struct{}
	runs int // that have their turn or wait for it; guarded by entry.mu
}

// takeTurn waits for the turn of a run. It returns how long it waited, and a function that ends the turn. The error is the cause
// of the end of ctx, queueTimeout after limit, or errInterrupted if interrupts had a value.
func (e *entry) takeTurn(ctx context.Context, name queueName, limit time.Duration, interrupts <-chan struct{}) (leave func(), waited time.Duration, err error) {
	e.mu.Lock()
	queue := e.queues[name]
	if queue == nil {
		queue = &runQueue{turn: make(chan struct{}, 1)}
		e.queues[name] = queue
	}
	queue.runs++
	e.mu.Unlock()
	forget := func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		if queue.runs--; queue.runs == 0 {
			delete(e.queues, name)
		}
	}
	begin := time.Now()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case queue.turn <- struct{}{}:
		if waited = time.Since(begin); waited < limit {
			return func() { <-queue.turn; forget() }, waited, nil
		}
		<-queue.turn
		err = queueTimeout{limit}
	case <-timer.C:
		err = queueTimeout{limit}
	case <-interrupts:
		err = errInterrupted
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	forget()
	return nil, 0, err
}

// connection returns the connection to the sandbox with this id. If there is none that works, it calls connect with the
// id. If the name does not have that sandbox, because it was stopped, connection returns errdefs.ErrNotFound.
func (e *entry) connection(ctx context.Context, id string, connect func(context.Context, string) (*conn, error)) (*conn, error) {
	if c, err := e.usableConn(id); c != nil || err != nil {
		return c, err
	}
	select {
	case e.connecting <- struct{}{}:
		defer func() { <-e.connecting }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if c, err := e.usableConn(id); c != nil || err != nil { // the state may have changed while this call waited
		return c, err
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

// usableConn returns the connection to the sandbox with this id, or nil if there is none or it is broken. If the name
// does not have that sandbox, usableConn returns errdefs.ErrNotFound.
func (e *entry) usableConn(id string) (*conn, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.rec.ID != id {
		return nil, notFound(e.name)
	}
	if e.conn == nil || e.conn.broken.Load() {
		return nil, nil
	}
	return e.conn, nil
}

// cpuSample is the last measurement of a sandbox's processor time.
type cpuSample struct {
	id      string
	at      time.Time
	used    time.Duration
	percent float64
}

// cpuPercent returns the share of one processor, in percent, that was used since the last measurement, or since the start
// if there is none. used is the processor time since the microVM was started. A measurement less than 100 ms after the last one returns
// the same result again, because so short a time is not meaningful.
func (e *entry) cpuPercent(rec Record, used time.Duration, now time.Time) float64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	last := e.sample
	if last.id != rec.ID {
		last = cpuSample{id: rec.ID, at: rec.CreatedAt, used: time.Duration(rec.CPUNanos)}
	}
	elapsed := now.Sub(last.at)
	if elapsed < 100*time.Millisecond {
		return last.percent
	}
	percent := max(0, 100*float64(used-last.used)/float64(elapsed))
	e.sample = cpuSample{rec.ID, now, used, percent}
	return percent
}
