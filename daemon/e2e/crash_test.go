package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/msbd/msbd/api/rpc"
)

// statefulSandbox returns the shared server with the running sandbox "box", in whose Python session x is 41.
// wantStateKept checks that the session was kept.
func statefulSandbox(t *testing.T) (s *server, key string) {
	t.Helper()
	s, key = sharedSandbox(t)
	s.python(t, key, "box", "x = 41")
	return s, key
}

// wantStateKept checks that a sandbox still has the Python session in which x is 41. when is for the failure message.
func (s *server) wantStateKept(t *testing.T, key, sandbox, when string) {
	t.Helper()
	if r := s.python(t, key, sandbox, "x + 1"); r.text("stdout") != "42\n" {
		t.Errorf("%s: x + 1 in sandbox %s: got %+v, want 42", when, sandbox, r)
	}
}

var sandboxesKeepRunning = regexp.MustCompile(`not running, but [1-9][0-9]* sandbox(es keep| keeps) running`)

func TestDaemonKillKeepsSandboxes(t *testing.T) {
	s, key := statefulSandbox(t)
	for range 2 { // the second one kills a server that has adopted the sandbox
		s.kill()
		if _, stderr, _ := s.msb("server", "status"); !strings.Contains(stderr, "not running") || !strings.Contains(stderr, "crashed or was killed") {
			t.Errorf("status of a killed server: %s", stderr)
		}
		// Only a server can stop sandboxes, so this must not pretend to have stopped them.
		if _, stderr, err := s.msb("server", "stop", "--sandboxes"); err == nil || !sandboxesKeepRunning.MatchString(stderr) {
			t.Errorf("stop --sandboxes of a killed server: %v, %s", err, stderr)
		}
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		if st, err := s.status(); err != nil || st.Recovery.Adopted == 0 || st.Recovery.Adopted != len(s.microVMs()) {
			t.Errorf("recovery: %+v, want the microVMs %v adopted: error %v", st.Recovery, s.microVMs(), err)
		}
		s.wantStateKept(t, key, "box", "after a kill")
	}
	// A stop of the server keeps the sandbox running.
	s.mustMSB(t, "server", "stop")
	<-s.done
	if _, stderr, _ := s.msb("server", "status"); !strings.Contains(stderr, "not running") || strings.Contains(stderr, "crashed") {
		t.Errorf("status of a stopped server: %s", stderr)
	}
	if _, stderr, err := s.msb("server", "stop", "--sandboxes"); err == nil || !sandboxesKeepRunning.MatchString(stderr) {
		t.Errorf("stop --sandboxes of a stopped server: %v, %s", err, stderr)
	}
	if err := s.start(); err != nil {
		t.Fatal(err)
	}
	s.wantStateKept(t, key, "box", "after a stop")
}

func TestDaemonKillDuringStartUndoesStart(t *testing.T) {
	s, key := sharedServer(t)
	// Kill the server later in the start each time: when the sandbox is starting, when its disks exist, when QEMU runs.
	for _, moment := range []string{"starting", "disks", qemu} {
		ended := make(chan struct{})
		go func() {
			// There is no template for this size, so the start takes as long as a boot.
			s.call(key, "sandbox.start", params{"sandbox": "half", "config": params{"memory": 384}})
			close(ended)
		}()
		var id string
		until(t, "the start of sandbox half to reach "+moment, func() bool {
			for _, b := range s.list() {
				if b.GetName() == "half" && b.GetState() == "starting" {
					id = b.GetId()
				}
			}
			switch {
			case id == "" || moment == "starting":
				return id != ""
			case moment == "disks":
				_, err := os.Stat(filepath.Join(s.state(), "disks", "sandboxes", id))
				return err == nil
			}
			return len(processes(qemu, id)) > 0
		})
		s.kill()
		<-ended
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		if err := s.sandboxLeaks([]string{id}); err != nil {
			t.Errorf("killed at the moment %q: %v", moment, err)
		}
		s.wantError(t, key, "sandbox.command.run", params{"sandbox": "half", "command": "true"}, 409, -32005, "its start was")
	}
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "half"}, nil)
	s.mustCall(t, key, "sandbox.stop", params{"sandbox": "half"}, nil)
}

// TestDaemonKillDuringClone kills the server a little later in the start from a template each time. The start is undone, or was
// complete.
func TestDaemonKillDuringClone(t *testing.T) {
	s, key := sharedServer(t)
	for delay := time.Duration(0); delay < 500*time.Millisecond; delay += 100 * time.Millisecond {
		ended := make(chan struct{})
		go func() {
			s.call(key, "sandbox.start", params{"sandbox": "half"})
			close(ended)
		}()
		time.Sleep(delay)
		s.kill()
		<-ended
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		if s.sandboxID("half") != "" {
			if resp, err := s.call(key, "sandbox.command.run", params{"sandbox": "half", "command": "true"}); err != nil || resp.Error != nil && resp.Error.Code != -32005 {
				t.Errorf("killed after %v: %+v, %v", delay, resp, err)
			}
			s.mustCall(t, key, "sandbox.stop", params{"sandbox": "half"}, nil)
		}
	}
	// What the kills left is noticed when the server closes.
}

// TestDaemonKillDuringTemplateBuild kills the server while it builds a template, and restarts the host during the next build. The
// server removes what is left of each build, and builds the template.
func TestDaemonKillDuringTemplateBuild(t *testing.T) {
	if hypervisorSettings["hypervisor"] == "kata" {
		t.Log("Kata's own driver has no templates")
		return
	}
	parallel(t)
	s := testServer(t)
	if err := s.importImages("python"); err != nil {
		t.Fatal(err)
	}
	for _, end := range []func(t *testing.T){func(*testing.T) { s.kill() }, s.rebootHost} {
		build := s.waitForTemplateBuild(t)
		disk := filepath.Join(s.state(), "disks", "sandboxes", filepath.Base(build))
		if _, err := os.Stat(disk); err != nil {
			t.Error(err)
		}
		end(t)
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{build, disk} {
			if _, err := os.Stat(path); err == nil {
				t.Errorf("%s is left of the build", path)
			}
		}
	}
	if err := s.waitForTemplates(1); err != nil {
		t.Fatal(err)
	}
	if from := s.startFrom(t, s.newKey(t), "box", "microsandbox/python"); from != "template" {
		t.Errorf("a sandbox was started from %q, want template", from)
	}
}

// rebootHost leaves of the server, which has no sandboxes, what a restart of the host leaves: the state directory. The
// processes end, and the run directory and the cgroups are gone.
func (s *server) rebootHost(t *testing.T) {
	t.Helper()
	s.kill()
	signalAll(t, processes("containerd", s.dir+"/"), syscall.SIGKILL)
	ids, err := filepath.Glob(filepath.Join(s.runDir, "vm", "template-*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range ids {
		id := filepath.Base(dir)
		until(t, "the end of the cgroups of "+id, func() bool { // QEMU, and what is about to become it, is in them
			groups := findPaths("/sys/fs/cgroup", func(path string) bool { return strings.Contains(path, id) })
			for _, group := range groups {
				pids, _ := os.ReadFile(filepath.Join(group, "cgroup.procs"))
				for _, field := range strings.Fields(string(pids)) {
					if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
						_ = syscall.Kill(pid, syscall.SIGKILL)
					}
				}
				_ = os.Remove(group)
			}
			return len(groups) == 0
		})
	}
	if err := os.RemoveAll(s.runDir); err != nil {
		t.Fatal(err)
	}
}

func TestProcessDeathIsDetectedAndCleanedUp(t *testing.T) {
	s, key := statefulSandbox(t)
	for _, program := range []string{qemu, shim} {
		t.Run(program, func(t *testing.T) {
			s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
			id := s.sandboxID("box")
			signalAll(t, processes(program, id), syscall.SIGKILL)
			s.wantSandboxFailed(t, key, "box", id)
		})
	}
	t.Run("while the server is down", func(t *testing.T) {
		s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
		id := s.sandboxID("box")
		s.kill()
		signalAll(t, processes(qemu, id), syscall.SIGKILL)
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		s.wantSandboxFailed(t, key, "box", id)
	})
	t.Run("after adoption", func(t *testing.T) {
		s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
		id := s.sandboxID("box")
		s.kill()
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		if st, _ := s.status(); st.Recovery.Adopted == 0 {
			t.Errorf("recovery: %+v, want the sandbox adopted", st.Recovery)
		}
		signalAll(t, processes(qemu, id), syscall.SIGKILL)
		s.wantSandboxFailed(t, key, "box", id)
	})
}

// wantSandboxFailed checks that the server reports the end of the sandbox's microVM, and that nothing of it is left on
// this host.
func (s *server) wantSandboxFailed(t *testing.T, key, sandbox, id string) {
	t.Helper()
	until(t, "the server to report the end of the sandbox", func() bool {
		a, err := s.call(key, "sandbox.command.run", params{"sandbox": sandbox, "command": "true", "timeout": 5})
		return err == nil && a.Error != nil && a.Error.Code == -32005 && strings.Contains(a.Error.Message, "ended")
	})
	until(t, "the removal of what the sandbox left", func() bool { return s.sandboxLeaks([]string{id}) == nil })
}

// TestDaemonKillKeepsSandboxWithBusyShim tests that a shim that does not respond while the server starts, as on a busy
// host, is not taken for dead.
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
	until(t, "the server to recover its sandboxes", func() bool {
		st, _ := s.status() // msb exits with an error until the server is ready
		return st.State == "recovering" || st.State == "ready"
	})
	time.Sleep(6 * time.Second) // by default, containerd tries twice to connect to a shim, and gives up after 2 s each time
	signalAll(t, shims, syscall.SIGCONT)
	until(t, "the server to be ready", func() bool {
		st, err := s.status()
		s.address = st.ListenAddress
		return err == nil && st.State == "ready"
	})
	s.wantStateKept(t, key, "box", "after the shim was busy")
}

func TestContainerdDeathKeepsSandboxes(t *testing.T) {
	s, key := statefulSandbox(t)
	signalAll(t, processes("containerd", s.dir+"/"), syscall.SIGKILL)
	s.wantStateKept(t, key, "box", "while containerd is down")
	until(t, "the restart of containerd", func() bool {
		a, err := s.call(key, "sandbox.start", params{"sandbox": "another"})
		return err == nil && a.Error == nil
	})
	t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": "another"}) })
	s.wantStateKept(t, key, "box", "after the restart of containerd")
}

// TestHungGuestCanBeStopped tests that a sandbox whose guest hangs is described without its usage, and can be stopped, which
// ends a command in it.
func TestHungGuestCanBeStopped(t *testing.T) {
	parallel(t)
	s, key := pythonServer(t)
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "box"}, nil)
	id := s.sandboxID("box")
	signalAll(t, processes(qemu, id), syscall.SIGSTOP)
	// Kata's shim ends a guest that has not responded for 30 s, so the rest must be faster.
	command := make(chan error, 1)
	go func() {
		a, err := s.call(key, "sandbox.command.run", params{"sandbox": "box", "command": "true"})
		if err == nil && a.Error == nil {
			err = errors.New("it succeeded")
		}
		command <- err
	}()
	var metrics rpc.MetricsResult
	s.mustCall(t, key, "sandbox.metrics.get", params{"sandbox": "box"}, &metrics)
	if m := metrics.Sandboxes; len(m) != 1 || m[0].State != rpc.StateRunning || m[0].MemoryUsage != nil {
		t.Errorf("metrics of a hung guest: %+v, want its state and no usage", m)
	}
	began := time.Now()
	s.mustCall(t, key, "sandbox.stop", params{"sandbox": "box"}, nil)
	t.Logf("stopping a hung guest took %s", time.Since(began).Round(time.Millisecond))
	if err := <-command; err != nil {
		t.Error("command in a hung guest:", err)
	}
	if err := s.sandboxLeaks([]string{id}); err != nil {
		t.Error(err)
	}
}

// TestHostContainerd tests a server that uses the host's containerd instead of a private one.
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
	t.Run("sandbox", func(t *testing.T) { // a subtest, so that its server is stopped before the host's containerd
		s := testServer(t, "--config", settings) // not with a copy of a state, whose image is in another containerd
		if err := s.importImages("python"); err != nil {
			t.Fatal(err)
		}
		key := s.newKey(t)
		s.containerd = socket
		s.mustCall(t, key, "sandbox.start", params{"sandbox": "guest"}, nil)
		if got := s.python(t, key, "guest", "6 * 7").text("stdout"); got != "42\n" {
			t.Errorf("6 * 7 in Python: got %q, want 42", got)
		}
		if len(processes("containerd", s.dir+"/")) != 0 {
			t.Error("the server started a private containerd, want only the host's")
		}
		id := s.sandboxID("guest")
		s.mustCall(t, key, "sandbox.stop", params{"sandbox": "guest"}, nil)
		if err := s.sandboxLeaks([]string{id}); err != nil {
			t.Error(err)
		}
	})
}
