package store_test

import (
	"testing"

	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/keys/keystest"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

// reopenable is a Store with its directory.
type reopenable struct {
	*store.Store
	dir string
}

func openIn(t *testing.T, dir string) reopenable {
	t.Helper()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return reopenable{s, dir}
}

func (s reopenable) reopen(t *testing.T) reopenable {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return openIn(t, s.dir)
}

func TestKeysContract(t *testing.T) {
	t.Parallel()
	keystest.TestStore(t,
		func(t *testing.T) keys.Store { return openIn(t, t.TempDir()) },
		func(t *testing.T, s keys.Store) keys.Store { return s.(reopenable).reopen(t) })
}

func TestSandboxesContract(t *testing.T) {
	t.Parallel()
	sandboxtest.TestStore(t,
		func(t *testing.T) sandbox.Store { return openIn(t, t.TempDir()) },
		func(t *testing.T, s sandbox.Store) sandbox.Store { return s.(reopenable).reopen(t) })
}
