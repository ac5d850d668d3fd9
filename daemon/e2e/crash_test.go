package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// statefulSandbox is the shared sandbox, which remembers x.
func statefulSandbox(t *testing.T) (s *server, key string) {
	t.Helper()
	s, key = sharedSandbox(t)
	s.python(t, key, "box", "x = 41")
	return s, key
}

// remembers proves that a sandbox goes on with the session that it had.
func (s *server) wantStateKept(t *testing.T, key, sandbox, when string) {
	t.Helper()
	if r := s.python(t, key, sandbox, "x + 1"); r.text("stdout") != "42\n" {
		t.Errorf("%s: %s: %+v", when, sandbox, r)
	}
}

func TestDaemonKillKeepsSandboxes(t *testing.T) {
	s, key := statefulSandbox(t)
	for range 3 {
		s.kill()
		if _, stderr, _ := s.msb("server", "status"); !strings.Contains(stderr, "not running") || !strings.Contains(stderr, "crashed or was killed") {
			t.Errorf("of a killed server, the status says: %s", stderr)
		}
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		if st, _ := s.status(); st.Recovery.Adopted != len(s.microVMs()) {
			t.Errorf("recovery: %+v", st.Recovery)
		}
		s.wantStateKept(t, key, "box", "after a kill")
	}
	// A stop leaves the sandbox running, too.
	s.mustMSB(t, "server", "stop")
	<-s.done
	if _, stderr, _ := s.msb("server", "status"); !strings.Contains(stderr, "not running") || strings.Contains(stderr, "killed") {
		t.Errorf("of a stopped server, the status says: %s", stderr)
	}
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	s.wantStateKept(t, key, "box", "after a stop")
}

func TestDaemonKillDuringStartUndoesStart(t *testing.T) {
	s, key := sharedServer(t)
	// Each time a little later in the start.
	for _, moment := range []string{"container", virtiofsd, qemu} {
		ended := make(chan struct{})
		go func() {
			s.call(key, "sandbox.start", params{"sandbox": "half"})
			close(ended)
		}()
		var id string
		until(t, moment, func() bool {
			for _, b := range s.list() {
				if b.GetName() == "half" && b.GetState() == "starting" {
					id = b.GetId()
				}
			}
			return id != "" && (moment == "container" || len(processes(moment, id)) > 0)
		})
		s.kill()
		<-ended
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		if err := s.sandboxLeaks([]string{id}); err != nil {
			t.Errorf("killed at %s: %v", moment, err)
		}
		s.wantError(t, key, "sandbox.command.run", params{"sandbox": "half", "command": "true"}, 409, -32005, "cut off")
	}
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "half"}, nil)
	s.mustCall(t, key, "sandbox.stop", params{"sandbox": "half"}, nil)
}

func TestProcessDeathIsDetectedAndCleanedUp(t *testing.T) {
	s, key := statefulSandbox(t)
	for _, part := range []string{qemu, virtiofsd, shim} {
		t.Run(part, func(t *testing.T) {
			s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
			id := s.sandboxID("box")
			signalAll(t, processes(part, id), syscall.SIGKILL)
			s.wantSandboxFailed(t, key, "box", id)
		})
	}
	t.Run("restart", func(t *testing.T) {
		s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
		id := s.sandboxID("box")
		s.kill()
		signalAll(t, processes(qemu, id), syscall.SIGKILL)
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		s.wantSandboxFailed(t, key, "box", id)
	})
	t.Run("adopted", func(t *testing.T) {
		for _, part := range []string{qemu, virtiofsd} {
			s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
			id := s.sandboxID("box")
			s.kill()
			if err := s.start(); err != nil {
				t.Fatal(err)
			}
			if st, _ := s.status(); st.Recovery.Adopted == 0 {
				t.Errorf("recovery: %+v", st.Recovery)
			}
			signalAll(t, processes(part, id), syscall.SIGKILL)
			s.wantSandboxFailed(t, key, "box", id)
		}
	})
}

// wantSandboxFailed proves that the end of a sandbox's microVM is noticed, and that nothing is left of it.
func (s *server) wantSandboxFailed(t *testing.T, key, sandbox, id string) {
	t.Helper()
	until(t, "the end of the sandbox to be noticed", func() bool {
		a, err := s.call(key, "sandbox.command.run", params{"sandbox": sandbox, "command": "true", "timeout": 5})
		return err == nil && a.Error != nil && a.Error.Code == -32005 && strings.Contains(a.Error.Message, "ended")
	})
	until(t, "its remains to be removed", func() bool { return s.sandboxLeaks([]string{id}) == nil })
}

// A shim that is busy while the server starts, as on a busy host, is no dead one.
func TestDaemonKillKeepsSandboxWithBusyShim(t *testing.T) {
	s, key := statefulSandbox(t)
	id := s.sandboxID("box")
	s.kill()
	shims := processes(shim, id)
	signalAll(t, shims, syscall.SIGSTOP)
	defer signalAll(t, shims, syscall.SIGCONT)
	if err := s.launch(); err != nil {
		t.Fatal(err)
	}
	until(t, "the server to look for its sandboxes", func() bool {
		st, _ := s.status() // an error, too, until it is ready
		return st.State == "recovering" || st.State == "ready"
	})
	time.Sleep(6 * time.Second) // by default, containerd gives up after 2, twice
	signalAll(t, shims, syscall.SIGCONT)
	until(t, "the server to be ready", func() bool {
		st, err := s.status()
		s.address = st.ListenAddress
		return err == nil && st.State == "ready"
	})
	s.wantStateKept(t, key, "box", "after its shim was busy")
}

func TestContainerdDeathKeepsSandboxes(t *testing.T) {
	s, key := statefulSandbox(t)
	signalAll(t, processes("containerd", s.dir), syscall.SIGKILL)
	s.wantStateKept(t, key, "box", "while containerd is away")
	until(t, "containerd to be back", func() bool {
		a, err := s.call(key, "sandbox.start", params{"sandbox": "another"})
		return err == nil && a.Error == nil
	})
	t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": "another"}) })
	s.wantStateKept(t, key, "box", "after containerd came back")
}

func TestHungGuestCanBeStopped(t *testing.T) {
	parallel(t)
	s := testServer(t)
	if err := s.importImages("python"); err != nil {
		t.Fatal(err)
	}
	key := s.newKey(t)
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
	id := s.sandboxID("box")
	signalAll(t, processes(qemu, id), syscall.SIGSTOP)
	if a, err := s.call(key, "sandbox.command.run", params{"sandbox": "box", "command": "true", "timeout": 2}); err != nil || a.Error == nil {
		t.Errorf("a command in a hung guest: %v, %v", a, err)
	}
	began := time.Now()
	s.mustCall(t, key, "sandbox.stop", params{"sandbox": "box"}, nil)
	t.Logf("stopping a hung guest took %s", time.Since(began).Round(time.Millisecond))
	if err := s.sandboxLeaks([]string{id}); err != nil {
		t.Error(err)
	}
}

func TestHostContainerd(t *testing.T) {
	parallel(t)
	dir, err := os.MkdirTemp("", "msbc")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "containerd.sock")
	toml := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.internal.v1.opt\"]\n[grpc]\n  address = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), socket)
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), []byte(toml), 0o600); err != nil {
		t.Fatal(err)
	}
	host := exec.Command(filepath.Join(bin, "containerd"), "--config", filepath.Join(dir, "config.toml"), "--log-level", "error")
	if err := host.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		host.Process.Signal(syscall.SIGTERM)
		host.Wait()
	}()
	until(t, "the host's containerd", func() bool { _, err := os.Stat(socket); return err == nil })

	settings := filepath.Join(dir, "msbd.toml")
	if err := os.WriteFile(settings, []byte(fmt.Sprintf("containerd = %q\n", socket)), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Run("serves", func(t *testing.T) { // its server ends before the host's containerd
		s := testServer(t, "--config", settings)
		s.containerd = socket
		if err := s.importImages("python"); err != nil {
			t.Fatal(err)
		}
		key := s.newKey(t)
		s.mustCall(t, key, "sandbox.start", params{"sandbox": "guest"}, nil)
		if got := s.python(t, key, "guest", "6 * 7").text("stdout"); got != "42\n" {
			t.Errorf("python: %q", got)
		}
		if len(processes("containerd", s.dir)) != 0 {
			t.Error("a private containerd runs, too")
		}
		id := s.sandboxID("guest")
		s.mustCall(t, key, "sandbox.stop", params{"sandbox": "guest"}, nil)
		if err := s.sandboxLeaks([]string{id}); err != nil {
			t.Error(err)
		}
	})
}
