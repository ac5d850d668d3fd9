package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// crashServer is a server of the test's own with one running sandbox that remembers x.
func crashServer(t *testing.T) (s *server, key string) {
	t.Helper()
	s = testServer(t)
	if err := s.importImages("python"); err != nil {
		t.Fatal(err)
	}
	key = s.key(t)
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
	s.python(t, key, "box", "x = 41")
	return s, key
}

func TestKillOfTheDaemonLosesNothing(t *testing.T) {
	s, key := crashServer(t)
	for range 3 {
		s.kill()
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		if st, _ := s.status(); st.Recovery.Adopted != 1 {
			t.Errorf("recovery: %+v", st.Recovery)
		}
		if got := s.python(t, key, "box", "x + 1").text("stdout"); got != "42\n" {
			t.Errorf("after a kill: %q", got)
		}
	}
	// A stop leaves the sandbox running, too.
	s.mustMSB(t, "server", "stop")
	<-s.done
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	if got := s.python(t, key, "box", "x + 1").text("stdout"); got != "42\n" {
		t.Errorf("after a stop: %q", got)
	}
}

func TestKillOfTheDaemonWhileStartingUndoesTheStart(t *testing.T) {
	s := testServer(t)
	if err := s.importImages("python"); err != nil {
		t.Fatal(err)
	}
	key := s.key(t)
	// Each time a little later in the start.
	for _, moment := range []string{"container", "virtiofsd", "qemu"} {
		ended := make(chan struct{})
		go func() {
			s.call(key, "sandbox.start", params{"sandbox": "half"})
			close(ended)
		}()
		until(t, moment, func() bool {
			switch moment {
			case "container":
				return len(s.sandboxIDs()) == 1
			case "virtiofsd":
				return len(processes("virtiofsd", s.dir)) > 0
			default:
				return len(processes("qemu-system", s.dir)) > 0
			}
		})
		s.kill()
		<-ended
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(left(s.runDir+"/vm", nil), s.leftOf(s.sandboxIDs())); err != nil {
			t.Errorf("killed at %s: %v", moment, err)
		}
		s.wantError(t, key, "sandbox.command.run", params{"sandbox": "half", "command": "true"}, 409, -32005, "cut off")
	}
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "half"}, nil)
}

func TestDeathOfAPartIsNoticedAndCleanedUp(t *testing.T) {
	s, key := crashServer(t)
	for _, part := range []string{"qemu-system", "virtiofsd", "containerd-shim-kata-v2"} {
		t.Run(part, func(t *testing.T) {
			s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
			id := s.sandboxIDs()[0]
			killAll(t, processes(part, id))
			until(t, "the sandbox to be failed", func() bool {
				a, err := s.call(key, "sandbox.command.run", params{"sandbox": "box", "command": "true", "timeout": 5})
				return err == nil && a.Error != nil && a.Error.Code == -32005
			})
			until(t, "its remains to be removed", func() bool { return s.leftOf([]string{id}) == nil })
		})
	}
	t.Run("restart", func(t *testing.T) {
		s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
		id := s.sandboxIDs()[0]
		s.kill()
		killAll(t, processes("qemu-system", id))
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		s.wantError(t, key, "sandbox.command.run", params{"sandbox": "box", "command": "true"}, 409, -32005, "ended")
		if err := s.leftOf([]string{id}); err != nil {
			t.Error(err)
		}
	})
}

func TestDeathOfContainerdIsMended(t *testing.T) {
	s, key := crashServer(t)
	killAll(t, processes("bin/containerd\x00", s.dir))
	if got := s.python(t, key, "box", "x + 1").text("stdout"); got != "42\n" {
		t.Errorf("while containerd is away: %q", got)
	}
	until(t, "containerd to be back", func() bool {
		a, err := s.call(key, "sandbox.start", params{"sandbox": "another"})
		return err == nil && a.Error == nil
	})
	if got := s.python(t, key, "box", "x + 1").text("stdout"); got != "42\n" {
		t.Errorf("after containerd came back: %q", got)
	}
}

func TestAHungGuestIsAnErrorAndCanBeStopped(t *testing.T) {
	s, key := crashServer(t)
	id := s.sandboxIDs()[0]
	for _, pid := range processes("qemu-system", id) {
		p, err := os.FindProcess(pid)
		if err != nil {
			t.Fatal(err)
		}
		stopProcess(t, p)
	}
	began := time.Now()
	s.mustCall(t, key, "sandbox.stop", params{"sandbox": "box"}, nil)
	t.Logf("stopping a hung guest took %s", time.Since(began).Round(time.Millisecond))
	if err := s.leftOf([]string{id}); err != nil {
		t.Error(err)
	}
}

// until waits for a condition outside of this process.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited a minute for %s", strings.TrimSpace(what))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestTheHostsContainerd(t *testing.T) {
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
		if err := s.importImages("python"); err != nil {
			t.Fatal(err)
		}
		key := s.key(t)
		s.mustCall(t, key, "sandbox.start", params{"sandbox": "guest"}, nil)
		if got := s.python(t, key, "guest", "6 * 7").text("stdout"); got != "42\n" {
			t.Errorf("python: %q", got)
		}
		if len(processes("bin/containerd\x00", s.dir)) != 0 {
			t.Error("a private containerd runs, too")
		}
	})
}
