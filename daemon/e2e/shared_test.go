package e2e

import (
	"path"
	"sync"
	"testing"
)

// The tests that need no server of their own share one, with one key for everything.
var shared struct {
	once   sync.Once
	server *server
	key    string
	err    error
}

func sharedServer(t testing.TB) (*server, string) {
	t.Helper()
	shared.once.Do(func() {
		s, err := newServer()
		if err == nil {
			shared.server = s
			err = s.start()
		}
		if err == nil {
			err = s.importImages("python")
		}
		if err == nil {
			shared.key = s.key(t)
		}
		shared.err = err
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	s := shared.server
	select {
	case <-s.done: // a test that failed left it so
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
	default:
	}
	t.Cleanup(func() {
		if t.Failed() {
			s.explain(t)
		}
	})
	return s, shared.key
}

// closeShared runs after all tests: it proves that what they left behind is nothing.
func closeShared() error {
	if shared.server == nil {
		return nil
	}
	return shared.server.close()
}

// sharedSandbox starts a sandbox on the shared server and stops it after the test.
func sharedSandbox(t testing.TB, name, image string) (*server, string) {
	t.Helper()
	s, key := sharedServer(t)
	if err := s.importImages(path.Base(image)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": name}) })
	s.mustCall(t, key, "sandbox.start", params{"sandbox": name, "config": params{"image": image}}, nil)
	return s, key
}

// sharedBox is the shared server with the sandbox "box", which goes on to the next test that asks for it: no
// test may expect it to be new.
func sharedBox(t testing.TB) (*server, string) {
	t.Helper()
	s, key := sharedServer(t)
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
	return s, key
}
