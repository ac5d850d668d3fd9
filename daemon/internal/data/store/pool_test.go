package store_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

// mortal is the store and the runtime of a server that is killed after a number of changes. What it does after that has no effect.
type mortal struct {
	*store.Store
	*sandboxtest.Runtime

	mu   sync.Mutex
	left int
	last string // the last change

	// starts is held while a sandbox starts. A refill waits for it, so that the order of the changes is always the same.
	starts chan struct{}
}

var errKilled = errors.New("the server was killed")

// change makes a change, unless the server was killed before.
func (m *mortal) change(what string, do func() error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.left == 0 {
		return errKilled
	}
	m.left--
	m.last = what
	return do()
}

func (m *mortal) PutSandbox(r sandbox.Record) error {
	if r.State == sandbox.Starting && r.Name.Name == "" {
		m.starts <- struct{}{}
		defer func() { <-m.starts }()
	}
	return m.change(fmt.Sprintf("put %s %q", r.State, r.Name.Name), func() error { return m.Store.PutSandbox(r) })
}

func (m *mortal) DeleteSandbox(id string) error {
	return m.change("delete", func() error { return m.Store.DeleteSandbox(id) })
}

func (m *mortal) Start(ctx context.Context, id string, t sandbox.Template, hostname string) (origin sandbox.Origin, err error) {
	err = m.change("start", func() error {
		origin, err = m.Runtime.Start(ctx, id, t, hostname)
		return err
	})
	return origin, err
}

func (m *mortal) Remove(ctx context.Context, id string) error {
	return m.change("remove", func() error { return m.Runtime.Remove(ctx, id) })
}

func (m *mortal) SetHostname(ctx context.Context, id, hostname string) error {
	return m.change("hostname", func() error { return m.Runtime.SetHostname(ctx, id, hostname) })
}

func (m *mortal) Attach(ctx context.Context, id, transfer string) (stream io.ReadWriteCloser, err error) {
	err = m.change("attach", func() error {
		stream, err = m.Runtime.Attach(ctx, id, transfer)
		return err
	})
	return stream, err
}

// Wherever a server is killed while it fills the pool, or while a sandbox takes an entry, the next server finds each microVM in
// one of these states: it is a sandbox that runs as its tenant asked, it waits in the pool as new, or it is removed.
func TestServerKilledWithAPool(t *testing.T) {
	steps := map[string]bool{}
	for kill := 0; ; kill++ {
		done := false
		synctest.Test(t, func(t *testing.T) { done = testKilledWithAPool(t, kill, steps) })
		if done {
			break
		}
	}
	for _, step := range []string{`put starting ""`, "start", "attach", `put pooled ""`, `put running "plain"`, `put starting "bound"`, "hostname", `put running "bound"`, "delete", "remove"} {
		if !steps[step] {
			t.Errorf("no server was killed after the step %s: %v", step, steps)
		}
	}
}

// testKilledWithAPool kills a server after a number of changes. It reports whether the server did all that it had to do before that.
func testKilledWithAPool(t *testing.T, kill int, steps map[string]bool) (done bool) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	runtime := sandboxtest.NewRuntime()
	run := func(left int, use func(*sandbox.Manager, *mortal)) (*mortal, []sandbox.Record) {
		db, err := store.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		server := &mortal{Store: db, Runtime: runtime, left: left, starts: make(chan struct{}, 1)}
		m := sandbox.NewManager(sandbox.Options{
			Store: server, Runtime: server, Connect: sandboxtest.NewGuest().Connect,
			Defaults: sandbox.Config{Template: sandbox.Template{Image: "default", CPUs: 1, MemoryMiB: 512, DiskMiB: 1024}},
			MaxCPUs:  4, MaxMemoryMiB: 4096, MaxDiskMiB: 8192, Disks: true, Boots: 2, StartTimeout: time.Minute, MaxRunTime: time.Hour,
			HostMemory: func() (available, total uint64, err error) { return 1 << 40, 1 << 40, nil },
			CheckSpace: func(uint64) error { return nil }, MakeRoom: func() bool { return false },
			Quota: func(string) sandbox.Quota { return sandbox.Quota{} },
			Pool:  sandbox.PoolOptions{Min: 1, Max: 1, MemoryMiB: 4096}, Log: slog.New(slog.DiscardHandler),
		})
		ctx, cancel := context.WithCancel(t.Context())
		var loop sync.WaitGroup
		loop.Go(func() { m.RunPool(ctx) })
		if _, err := m.Recover(ctx); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		use(m, server)
		synctest.Wait()
		cancel()
		loop.Wait()
		m.Close()
		records, err := db.Sandboxes()
		if err != nil {
			t.Fatal(err)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		return server, records
	}
	plain, bound := sandbox.Name{Namespace: "default", Name: "plain"}, sandbox.Name{Namespace: "default", Name: "bound"}
	started := map[sandbox.Name]bool{} // starts that were acknowledged
	start := func(m *sandbox.Manager, server *mortal, name sandbox.Name, req sandbox.Request) {
		server.starts <- struct{}{}
		started[name] = m.Start(t.Context(), name, req) == nil
		<-server.starts
		time.Sleep(time.Second) // the pool is filled again, but not at once
		synctest.Wait()
	}
	server, _ := run(kill, func(m *sandbox.Manager, server *mortal) {
		start(m, server, plain, sandbox.Request{})
		start(m, server, bound, sandbox.Request{Hostname: "web"})
		_, _ = m.SetPool(t.Context(), sandbox.Request{}, 0, 0) // removes the entry
	})
	steps[server.last] = true
	run(1000, func(m *sandbox.Manager, _ *mortal) {
		if _, err := m.SetPool(t.Context(), sandbox.Request{}, 1, 1); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		pooled := m.PoolStatus().Templates[0].Ready
		running := 0
		for _, rec := range m.List("") {
			if rec.State != sandbox.Running {
				continue
			}
			running++
			if want := map[sandbox.Name]string{plain: sandbox.DefaultHostname, bound: "web"}[rec.Name]; runtime.Hostname(rec.ID) != want {
				t.Errorf("killed after %d changes, the last was %s: the hostname of %s is %q", kill, server.last, rec.Name, runtime.Hostname(rec.ID))
			}
			delete(started, rec.Name)
		}
		for name, acknowledged := range started {
			if acknowledged {
				t.Errorf("killed after %d changes, the last was %s: sandbox %s does not run", kill, server.last, name)
			}
		}
		if pooled != 1 || runtime.Len() != running+pooled {
			t.Errorf("killed after %d changes, the last was %s: %d sandboxes run, %d entries in the pool, but %d microVMs", kill, server.last, running, pooled, runtime.Len())
		}
	})
	return server.left > 0
}
