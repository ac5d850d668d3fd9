package e2e

import (
	"path"
	"sync"
	"testing"
)

// shared holds the server that the tests without a server of their own share, and an unlimited API key for it.
var shared struct {
	once   sync.Once
	server *server
	key    string
	err    error
}

// sharedServer returns the shared server and its API key. It starts the server if it is not running.
func sharedServer(t testing.TB) (*server, string) {
	t.Helper()
	shared.once.Do(func() {
		s, err := newServer()
		if err == nil {
			shared.server = s
			if hypervisorSettings == nil { // else another server, only to make the state, would take too long
				err = s.plant()
			}
		}
		if err == nil {
			err = s.start()
		}
		if err == nil {
			err = s.importImages("python")
		}
		if err == nil && hypervisorSettings["hypervisor"] != "kata" { // Kata's own driver has no templates
			err = s.waitForTemplates(1)
		}
		if err == nil {
			shared.key = s.newKey(t)
		}
		shared.err = err
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	s := shared.server
	select {
	case <-s.done: // an earlier test that failed left the server stopped
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
	default:
	}
	t.Cleanup(func() {
		if t.Failed() {
			s.logDiagnostics(t)
		}
	})
	return s, shared.key
}

// closeShared stops the shared server after all tests. It returns an error if the tests left anything on this host.
func closeShared() error {
	if shared.server == nil {
		return nil
	}
	return shared.server.close()
}

// startSandbox starts a new sandbox on the shared server and stops it after the test.
func startSandbox(t testing.TB, name, image string) (*server, string) {
	t.Helper()
	s, key := sharedServer(t)
	if err := s.importImages(path.Base(image)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": name}) })
	s.mustCall(t, key, "sandbox.start", params{"sandbox": name, "config": params{"image": image}}, nil)
	return s, key
}

// sharedSandbox returns the shared server with a running sandbox "box". The sandbox keeps running for later tests, so a
// test must not expect a fresh one.
func sharedSandbox(t testing.TB) (*server, string) {
	t.Helper()
	s, key := sharedServer(t)
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
	return s, key
}
