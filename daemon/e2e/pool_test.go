package e2e

import (
	"bytes"
	"net/http"
	"testing"
	"time"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

// waitForPool waits until a microVM waits in the pool, and returns the status of the default pool.
func (s *server) waitForPool(t testing.TB) (pool *adminv1.Pool) {
	t.Helper()
	a := s.admin(t)
	until(t, "a microVM in the pool", func() bool {
		status, err := a.PoolStatus(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if pools := status.GetPools(); len(pools) > 0 {
			pool = pools[0]
		}
		return pool.GetReady() > 0
	})
	return pool
}

// A sandbox starts from a microVM that was started in advance, and sees nothing of that. Such a microVM survives a server that is
// killed, and ends when the server is stopped.
func TestPool(t *testing.T) {
	s, key := pythonServer(t)
	s.reconfigure(t, map[string]string{"pool-min": "1", "pool-max": "1"})
	start := func(body string) string {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+s.address+"/api/v1/rpc", bytes.NewReader([]byte(body)))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+key)
		req.Header.Set("Content-Type", "application/json")
		res, err := httpClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusOK {
			t.Errorf("start: %s", res.Status)
		}
		return res.Header.Get("Msb-Started-From")
	}
	s.waitForPool(t)
	s.kill()
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	before := s.waitForPool(t).GetEntries()[0].GetCreatedAt().AsTime()
	if age := time.Since(before); age < 0 {
		t.Errorf("the age of the microVM in the pool is %s", age)
	}
	if from := start(`{"jsonrpc":"2.0","id":1,"method":"sandbox.start","params":{"sandbox":"plain"}}`); from != "pool" {
		t.Errorf("the first start was from %q", from)
	}
	if r := s.python(t, key, "plain", "'x' in globals(), '_' in vars(__builtins__)"); r.text("stdout") != "(False, False)\n" {
		t.Errorf("the first run: %+v", r)
	}
	s.waitForPool(t)
	if from := start(`{"jsonrpc":"2.0","id":1,"method":"sandbox.start","params":{"sandbox":"bound","config":{"image":"docker.io/microsandbox/python:latest","envs":["A=b","TZ=Asia/Tokyo"],"workdir":"/work"}}}`); from != "pool" {
		t.Errorf("the second start was from %q", from)
	}
	if r := s.python(t, key, "bound", "import os, time; os.environ['A'], os.getcwd(), time.strftime('%z')"); r.text("stdout") != "('b', '/work', '+0900')\n" {
		t.Errorf("the first run with an environment and a workdir: %+v", r)
	}
	for _, name := range []string{"plain", "bound"} {
		s.mustCall(t, key, "sandbox.stop", params{"sandbox": name}, nil)
	}
	s.waitForPool(t)
	s.mustMSB(t, "server", "stop")
	<-s.done
	if vms := processes(qemu, s.dir+"/"); len(vms) > 0 {
		t.Errorf("microVMs are left: %v", vms)
	}
	s.settings["pool-min"] = "0"
	if err := s.start(); err != nil { // the cleanup of the test needs a server
		t.Fatal(err)
	}
}
