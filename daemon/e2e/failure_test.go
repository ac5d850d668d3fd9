package e2e

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// wantStartRefused checks that the server does not start but exits, that its output contains words, and that it leaves
// nothing on this host.
func wantStartRefused(t *testing.T, s *server, words ...string) {
	t.Helper()
	err := s.start()
	if err == nil {
		t.Fatal("the server started, want an error")
	}
	select {
	case <-s.done:
	default: // start has waited long enough
		t.Fatalf("the server is neither ready nor has it exited: %v", err)
	}
	for _, word := range words {
		if !strings.Contains(s.log.String(), word) {
			t.Errorf("the output does not contain %q:\n%s", word, s.log)
		}
	}
	if err := s.leaks(s.dir, nil); err != nil {
		t.Error(err)
	}
	os.RemoveAll(s.dir)
}

func TestServerRefusesToStart(t *testing.T) {
	parallel(t)
	create := func(t *testing.T, flags ...string) *server {
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
		wantStartRefused(t, create(t, "--port", port), port, "in use")
	})
	t.Run("unreadable configuration", func(t *testing.T) {
		wantStartRefused(t, create(t, "--config", "/nonexistent/msbd.toml"), "/nonexistent/msbd.toml")
	})
	t.Run("bad configuration", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "msbd.toml")
		if err := os.WriteFile(path, []byte("color = 'red'\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		wantStartRefused(t, create(t, "--config", path), "color")
	})
	t.Run("dev mode off loopback", func(t *testing.T) {
		wantStartRefused(t, create(t, "--dev", "--host", "0.0.0.0"), "dev mode", "loopback only")
	})
	t.Run("plaintext off loopback", func(t *testing.T) {
		wantStartRefused(t, create(t, "--host", "0.0.0.0"), "0.0.0.0", "plain text")
	})
	t.Run("no QEMU", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "msbd.toml")
		if err := os.WriteFile(path, []byte("qemu = '/nonexistent/qemu'\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		wantStartRefused(t, create(t, "--config", path), "/nonexistent/qemu")
	})
	t.Run("no guest kernel", func(t *testing.T) {
		lib := libDir(t)
		if err := os.Remove(filepath.Join(lib, "guest", "vmlinux")); err != nil {
			t.Fatal(err)
		}
		wantStartRefused(t, create(t, "--lib-dir", lib), "vmlinux", "make guest")
	})
}

// TestSecondDaemonIsRefused tests that a second start of the same server changes nothing, and that a server with
// another run directory cannot use the same state directory.
func TestSecondDaemonIsRefused(t *testing.T) {
	parallel(t)
	s := testServer(t)
	key := s.newKey(t)
	out, stderr, err := s.msb(s.args()...)
	if err != nil || !strings.Contains(stderr, "already running") {
		t.Errorf("second start of the same server: %v, want success and \"already running\"\n%s%s", err, out, stderr)
	}
	other := &server{dir: s.dir, runDir: filepath.Join(s.dir, "run2"), settings: hypervisorSettings}
	if err := other.start(); err == nil {
		t.Error("a second daemon started in the same state directory")
	} else if !strings.Contains(other.log.String(), s.state()+" is in use") {
		t.Errorf("the output of the second daemon does not say that %s is in use:\n%s", s.state(), other.log)
	}
	<-other.done
	s.mustCall(t, key, "sandbox.metrics.get", params{}, nil)
}

func TestInvalidRequestsAreRefused(t *testing.T) {
	s, key := sharedServer(t)
	s.wantError(t, key, "sandbox.start", params{"sandbox": "../../etc"}, 400, -32602, "sandbox")
	s.wantError(t, key, "sandbox.start", params{"sandbox": "x", "namespace": "a/b"}, 400, -32602, "namespace")
	s.wantError(t, key, "sandbox.start", params{"sandbox": "x", "config": params{"image": "no/such-image"}}, 400, -32602, "no/such-image")
	s.wantError(t, key, "sandbox.start", params{"sandbox": "x", "config": params{"memory": 1 << 30}}, 400, -32602, "memory")
	s.wantError(t, key, "sandbox.stop", params{"sandbox": "never-started"}, 404, -32003, "never-started")
	s.wantError(t, key, "sandbox.explode", params{}, 404, -32601, "")
	if a, err := s.post(key, "/api/v1/rpc", []byte(`{"jsonrpc":"2.0",`)); err != nil || a.Status != 400 || a.Error == nil || a.Error.Code != -32700 {
		t.Errorf("malformed JSON: got %v, error %v, want HTTP 400, error -32700", a, err)
	}
	if id := s.sandboxID("x"); id != "" {
		t.Errorf("a refused start left sandbox x with the id %s", id)
	}
}

// TestGuestBootFailureIsCleanedUp tests that the start of a sandbox whose guest panics or hangs fails and leaves
// nothing.
func TestGuestBootFailureIsCleanedUp(t *testing.T) {
	parallel(t)
	for name, initrd := range map[string][]byte{
		"panics": cpio("nothing", nil), // no /init: the kernel panics, and the VM ends
		"hangs":  cpio("init", sleeper()),
	} {
		t.Run(name, func(t *testing.T) {
			lib := libDir(t)
			image := filepath.Join(lib, "guest", "initrd.img")
			if err := os.Remove(image); err != nil { // a symbolic link to the real initramfs
				t.Fatal(err)
			}
			if err := os.WriteFile(image, initrd, 0o644); err != nil {
				t.Fatal(err)
			}
			s, err := newServer("--lib-dir", lib)
			if err == nil {
				err = s.plant()
			}
			if err != nil {
				t.Fatal(err)
			}
			s.set("max-templates", "0") // a template would be built with the same guest
			s.startFor(t)
			key := s.newKey(t)
			began := time.Now()
			s.wantError(t, key, "sandbox.start", params{"sandbox": "mute"}, 503, -32009, "did not start")
			t.Logf("the start failed after %s", time.Since(began).Round(time.Millisecond))
			if err := s.sandboxLeaks([]string{s.sandboxID("mute")}); err != nil {
				t.Error(err)
			}
			if n := len(s.microVMs()); n != 0 {
				t.Errorf("%d microVMs still run", n)
			}
			out := s.mustMSB(t, "server", "list")
			if !strings.Contains(out, "its start failed") {
				t.Errorf("msb server list does not report the failed start:\n%s", out)
			}
			// The start of a guest that panics fails at once; only a guest that hangs uses up the time limit.
			if ended := strings.Contains(out, "Kernel panic") && !strings.Contains(out, "deadline"); ended != (name == "panics") {
				t.Errorf("a guest that %s: reported as ended: %t:\n%s", name, ended, out)
			}
		})
	}
}

func TestStopWhileStarting(t *testing.T) {
	s, key := sharedServer(t)
	started := make(chan response, 1)
	go func() {
		a, _ := s.call(key, "sandbox.start", params{"sandbox": "brief"})
		started <- a
	}()
	var id string
	until(t, "the microVM to boot", func() bool {
		id = s.sandboxID("brief")
		return id != "" && len(processes(qemu, id)) > 0
	})
	s.mustCall(t, key, "sandbox.stop", params{"sandbox": "brief"}, nil)
	if a := <-started; a.Error == nil || !strings.Contains(a.Error.Message, "stopped while it was starting") {
		t.Errorf("start of a sandbox that is stopped meanwhile: %v", a)
	}
	if err := s.sandboxLeaks([]string{id}); err != nil {
		t.Error(err)
	}
}

// cpio returns an initramfs with one executable file.
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

// sleeper returns an ELF program that sleeps forever.
func sleeper() []byte {
	const address = 0x400000
	code := []byte{
		0xb8, byte(unix.SYS_PAUSE), 0, 0, 0, // mov eax, SYS_PAUSE
		0x0f, 0x05, // syscall
		0xeb, 0xf7, // jmp back to the mov
	}
	header := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: uint64(binary.Size(elf.Header64{})), Ehsize: uint16(binary.Size(elf.Header64{})),
		Phentsize: uint16(binary.Size(elf.Prog64{})), Phnum: 1,
	}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS], header.Ident[elf.EI_DATA], header.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	start := header.Phoff + uint64(header.Phentsize)
	header.Entry = address + start
	size := start + uint64(len(code))
	segment := elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Vaddr: address, Filesz: size, Memsz: size, Align: 0x1000}
	var b bytes.Buffer
	for _, part := range []any{header, segment, code} {
		binary.Write(&b, binary.LittleEndian, part)
	}
	return b.Bytes()
}

// libDir returns a new directory with symbolic links to the files of bin. A test may replace links in it.
func libDir(t *testing.T) string {
	t.Helper()
	lib := t.TempDir()
	if err := os.Mkdir(filepath.Join(lib, "guest"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"", "guest"} {
		entries, err := os.ReadDir(filepath.Join(bin, dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.IsDir() {
				continue
			}
			if err := os.Symlink(filepath.Join(bin, dir, e.Name()), filepath.Join(lib, dir, e.Name())); err != nil {
				t.Fatal(err)
			}
		}
	}
	return lib
}
