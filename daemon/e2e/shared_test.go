package e2e

import (
	"sync"
	"testing"
)

// The tests that disturb nothing share one server, with both images and one key for everything.
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
			err = s.importImages("python", "node")
		}
		if err == nil {
			shared.key = s.key(t)
		}
		shared.err = err
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.server, shared.key
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
	s.mustCall(t, key, "sandbox.start", params{"sandbox": name, "config": params{"image": image}}, nil)
	t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": name}) })
	return s, key
}
