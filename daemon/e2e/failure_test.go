package e2e

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func stopProcess(t *testing.T, p *os.Process) {
	t.Helper()
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
}

// refusesToStart proves that the server ends by itself with a clear word, and leaves nothing.
func refusesToStart(t *testing.T, s *server, words ...string) {
	t.Helper()
	err := s.start()
	if err == nil {
		t.Fatal("the server started")
	}
	select {
	case <-s.done:
	case <-time.After(10 * time.Second):
		t.Fatalf("the server neither serves nor ends: %v", err)
	}
	for _, word := range words {
		if !strings.Contains(s.log.String(), word) {
			t.Errorf("no word of %q in:\n%s", word, s.log)
		}
	}
	if err := left(s.dir, nil); err != nil {
		t.Error(err)
	}
	os.RemoveAll(s.dir)
}

func TestServersThatCannotStartSayWhy(t *testing.T) {
	make := func(t *testing.T, flags ...string) *server {
		s, err := newServer(flags...)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	t.Run("port in use", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		refusesToStart(t, make(t, "--port", port), port, "in use")
	})
	t.Run("unreadable configuration", func(t *testing.T) {
		refusesToStart(t, make(t, "--config", "/nonexistent/msbd.toml"), "/nonexistent/msbd.toml")
	})
	t.Run("bad configuration", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "msbd.toml")
		if err := os.WriteFile(path, []byte("colour = 'red'\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		refusesToStart(t, make(t, "--config", path), "colour")
	})
	t.Run("dev mode for the world", func(t *testing.T) {
		refusesToStart(t, make(t, "--dev", "--host", "0.0.0.0"), "dev")
	})
	t.Run("plaintext for the world", func(t *testing.T) {
		refusesToStart(t, make(t, "--host", "0.0.0.0"), "0.0.0.0")
	})
	t.Run("no QEMU", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "msbd.toml")
		if err := os.WriteFile(path, []byte("qemu = '/nonexistent/qemu'\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		refusesToStart(t, make(t, "--config", path), "/nonexistent/qemu")
	})
	t.Run("no guest kernel", func(t *testing.T) {
		lib := libDir(t)
		if err := os.Remove(filepath.Join(lib, "guest", "vmlinux")); err != nil {
			t.Fatal(err)
		}
		refusesToStart(t, make(t, "--lib-dir", lib), "vmlinux", "make guest")
	})
}

func TestSecondDaemonOnTheSameState(t *testing.T) {
	s := testServer(t)
	key := s.key(t)
	out, stderr, err := s.msb(s.args()...)
	if err == nil && !strings.Contains(out+stderr, "already") {
		t.Errorf("a second start: %v\n%s%s", err, out, stderr)
	}
	other := &server{dir: s.dir, runDir: filepath.Join(s.dir, "run2")}
	if err := other.start(); err == nil {
		t.Error("two daemons share one state directory")
	} else if !strings.Contains(other.log.String(), s.state()) {
		t.Errorf("the second says: %s", other.log)
	}
	<-other.done
	s.mustCall(t, key, "sandbox.metrics.get", params{}, nil)
}

func TestBadInputOverTheWire(t *testing.T) {
	s, key := sharedServer(t)
	s.wantError(t, key, "sandbox.start", params{"sandbox": "../../etc"}, 400, -32602, "sandbox")
	s.wantError(t, key, "sandbox.start", params{"sandbox": "x", "namespace": "a/b"}, 400, -32602, "namespace")
	s.wantError(t, key, "sandbox.start", params{"sandbox": "x", "config": params{"image": "no/such-image"}}, 400, -32602, "no/such-image")
	s.wantError(t, key, "sandbox.start", params{"sandbox": "x", "config": params{"memory": 1 << 30}}, 400, -32602, "memory")
	s.wantError(t, key, "sandbox.stop", params{"sandbox": "never-started"}, 404, -32003, "never-started")
	s.wantError(t, key, "sandbox.explode", params{}, 404, -32601, "")
	if a, err := s.post(key, "/api/v1/rpc", []byte(`{"jsonrpc":"2.0",`)); err != nil || a.Status != 400 || a.Error.Code != -32700 {
		t.Errorf("malformed JSON: %v %v", a, err)
	}
	if ids := s.sandboxIDs(); len(ids) != 0 {
		t.Errorf("sandboxes are left: %v", ids)
	}
}

func TestGuestThatNeverAnswersIsUndone(t *testing.T) {
	for name, initrd := range map[string][]byte{
		"panics": cpio("nothing", nil), // no /init: the kernel panics, and the machine ends
		"hangs":  cpio("init", build(t, "package main\nimport \"time\"\nfunc main() { for { time.Sleep(time.Hour) } }")),
	} {
		t.Run(name, func(t *testing.T) {
			lib := libDir(t)
			image := filepath.Join(lib, "guest", "initrd.img")
			if err := os.Remove(image); err != nil { // a link to the real one
				t.Fatal(err)
			}
			if err := os.WriteFile(image, initrd, 0o600); err != nil {
				t.Fatal(err)
			}
			s := testServer(t, "--lib-dir", lib)
			if err := s.importImages("python"); err != nil {
				t.Fatal(err)
			}
			key := s.key(t)
			began := time.Now()
			s.wantError(t, key, "sandbox.start", params{"sandbox": "mute"}, 503, -32009, "did not start")
			t.Logf("refused after %s", time.Since(began).Round(time.Millisecond))
			if err := s.leftOf(s.sandboxIDs()); err != nil {
				t.Error(err)
			}
			if len(processes("qemu-system", s.dir)) != 0 {
				t.Error("QEMU is left")
			}
			if out := s.mustMSB(t, "server", "list"); !strings.Contains(out, "its start failed") {
				t.Errorf("administrators are told: %s", out)
			}
		})
	}
}

func TestStopWhileStarting(t *testing.T) {
	s, key := sharedServer(t)
	started := make(chan answer, 1)
	go func() {
		a, _ := s.call(key, "sandbox.start", params{"sandbox": "brief"})
		started <- a
	}()
	until(t, "the microVM to boot", func() bool {
		ids := s.sandboxIDs()
		return len(ids) == 1 && len(processes("qemu-system", ids[0])) > 0
	})
	ids := s.sandboxIDs()
	s.mustCall(t, key, "sandbox.stop", params{"sandbox": "brief"}, nil)
	if a := <-started; a.Error == nil || !strings.Contains(a.Error.Message, "stopped while it was starting") {
		t.Errorf("start: %v", a)
	}
	if err := s.leftOf(ids); err != nil {
		t.Error(err)
	}
}

// cpio is an initramfs of one executable file.
func cpio(name string, content []byte) []byte {
	var b bytes.Buffer
	entry := func(name string, mode int, content []byte) {
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", 1, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0)
		pad := func() {
			for b.Len()%4 != 0 {
				b.WriteByte(0)
			}
		}
		b.WriteString(name + "\x00")
		pad()
		b.Write(content)
		pad()
	}
	entry(name, 0o100755, content)
	entry("TRAILER!!!", 0, nil)
	return b.Bytes()
}

// build compiles a static program.
func build(t *testing.T, source string) []byte {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", "program", "main.go")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	program, err := os.ReadFile(filepath.Join(dir, "program"))
	if err != nil {
		t.Fatal(err)
	}
	return program
}

// libDir is a copy of bin, in links, of which a test may change parts.
func libDir(t *testing.T) string {
	t.Helper()
	lib := t.TempDir()
	if err := os.Mkdir(filepath.Join(lib, "guest"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"containerd", "containerd-shim-kata-v2", "guest/vmlinux", "guest/initrd.img"} {
		if err := os.Symlink(filepath.Join(bin, f), filepath.Join(lib, f)); err != nil {
			t.Fatal(err)
		}
	}
	return lib
}
